from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ilvr_ds.distill import ema
from ilvr_ds.distill.ema import MomentumShards

CPU = torch.device("cpu")
SIZES = [20, 7, 0, 3, 14]


def draw(seed: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(size, generator=generator).to(dtype) for size in SIZES]


def follow(shards: MomentumShards, initial: list[Tensor], steps: int, rate: float) -> tuple[list[Tensor], list[Tensor]]:
    """Several updates, and the same in float64 on whole tensors; returns both averages."""
    dense = [values.double() for values in initial]
    for step in range(1, steps + 1):
        student = draw(step)
        shards.update(iter(student))
        dense = [rate * average + (1 - rate) * values.double() for average, values in zip(dense, student, strict=True)]
    return shards.state(), dense


@pytest.mark.parametrize("piece", [1, 5, 7, 2**25])
def test_the_average_is_the_dense_one_whatever_the_pieces(piece: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ema, "PIECE", piece)
    published, initial = [torch.zeros(size) for size in SIZES], draw(0)
    shards = MomentumShards(published, initial, 0.9, CPU)
    found, wanted = follow(shards, initial, steps=6, rate=0.9)
    for average, dense, shard in zip(found, wanted, published, strict=True):
        assert average.dtype == torch.float32
        # 6 updates, each rounded to float32
        torch.testing.assert_close(average.double(), dense, rtol=1e-6, atol=1e-6)
        assert torch.equal(shard, average), "the network reads what was averaged"


def test_momentum_0_copies_and_momentum_1_stands_still() -> None:
    for rate, expected in ((0.0, draw(1)), (1.0, draw(0))):
        shards = MomentumShards(draw(0), draw(0), rate, CPU)
        shards.update(draw(1))
        assert all(map(torch.equal, shards.state(), expected))


@pytest.mark.parametrize("piece", [5, 2**25])
def test_the_drift_sums_tell_how_far_behind_the_teacher_is(piece: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ema, "PIECE", piece)
    shards = MomentumShards(draw(0), draw(0), 0.75, CPU)
    shards.update(draw(1))
    found = shards.take_drift()
    student, initial = (torch.cat(draw(seed)).double() for seed in (1, 0))
    behind = 0.75 * (initial - student)
    wanted = torch.stack([behind.square().sum(), student.square().sum()])
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=0)
    assert not shards.take_drift().any(), "each update counts once"


def test_a_bf16_teacher_moves_where_bf16_arithmetic_stands_still() -> None:
    teacher, student = torch.ones(4, dtype=torch.bfloat16), torch.full((4,), 1.5)
    naive = teacher.clone()
    shards = MomentumShards([teacher], [torch.ones(4)], 0.999, CPU)
    for _ in range(100):
        shards.update([student])
        naive.copy_(0.999 * naive + 0.001 * student.bfloat16())
    assert torch.equal(naive, torch.ones(4, dtype=torch.bfloat16))
    wanted = 1 + 0.5 * (1 - 0.999**100)
    torch.testing.assert_close(shards.state()[0], torch.full((4,), wanted), rtol=1e-6, atol=0)
    assert torch.equal(teacher, torch.full((4,), wanted).bfloat16())


def test_the_average_begins_with_the_student_and_not_with_its_rounding() -> None:
    initial = [torch.tensor([1 / 3, 1e-3])]
    shards = MomentumShards([initial[0].bfloat16()], initial, 0.9, CPU)
    assert torch.equal(shards.state()[0], initial[0])


def test_a_state_is_taken_over_and_published(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ema, "PIECE", 6)
    shards = MomentumShards(draw(0), draw(0), 0.9, CPU)
    shards.update(draw(1))
    saved = [values.clone() for values in shards.state()]
    monkeypatch.setattr(ema, "PIECE", 9)
    published = draw(5, torch.bfloat16)
    restored = MomentumShards(published, draw(5), 0.9, CPU)
    restored.load_state(saved)
    assert all(map(torch.equal, restored.state(), saved))
    assert all(torch.equal(shard, values.bfloat16()) for shard, values in zip(published, saved, strict=True))
    restored.update(draw(2))
    shards.update(draw(2))
    assert all(map(torch.equal, restored.state(), shards.state())), "it goes on as if it had never stopped"


def test_a_state_of_another_size_is_refused() -> None:
    shards = MomentumShards(draw(0), draw(0), 0.9, CPU)
    state = shards.state()
    state[1] = state[1][:-1]
    with pytest.raises(ValueError, match="a teacher shard has 7 elements, the stored one 6"):
        shards.load_state(state)


def test_a_state_of_fewer_shards_is_refused() -> None:
    shards = MomentumShards(draw(0), draw(0), 0.9, CPU)
    with pytest.raises(ValueError, match="shorter"):
        shards.load_state(shards.state()[:-1])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("rests_on", ["cpu", "cuda"])
def test_on_a_gpu_pieces_in_several_streams_give_the_same(rests_on: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The bug: a stream that reads a student's shard before it is there, or a copy that nobody waits for."""
    monkeypatch.setattr(ema, "PIECE", 2**18)
    gpu, rate = torch.device("cuda"), 0.9
    initial = [torch.randn(2**20 + extra) for extra in range(5)]
    published = [values.to(torch.bfloat16).to(rests_on) for values in initial]
    published = [shard.pin_memory() if rests_on == "cpu" else shard for shard in published]
    shards = MomentumShards(published, initial, rate, gpu)
    dense = [values.double() for values in initial]
    for _ in range(4):
        students = [torch.randn_like(values) for values in initial]
        # each shard is made just before it is asked for, and let go of at once
        shards.update(students[number].to(gpu, non_blocking=True).add(0.0) for number in range(5))
        dense = [rate * average + (1 - rate) * values.double() for average, values in zip(dense, students, strict=True)]
        shards.wait()
        for shard, average in zip(published, dense, strict=True):
            torch.testing.assert_close(shard.double().cpu(), average, rtol=2**-7, atol=1e-6)
    for found, wanted in zip(shards.state(), dense, strict=True):
        torch.testing.assert_close(found.double(), wanted, rtol=1e-6, atol=1e-6)
    behind = sum(float((a - s.double()).square().sum()) for a, s in zip(dense, students, strict=True))
    shards.take_drift()
    shards.update(values.to(gpu) for values in students)
    assert float(shards.take_drift()[0]) == pytest.approx(rate**2 * behind, rel=1e-4)
