from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from ilvr_ds import dist
from ilvr_ds.monitoring import throughput
from ilvr_ds.monitoring.throughput import Throughput, model_flops, peak_flops
from ilvr_ds.planning.flops import ModelFlops, Work
from ilvr_ds.planning.geometry import KNOWN
from tests.monitoring.clock import Clock

FLOPS = ModelFlops(KNOWN["3b"], trained=10**9, frozen=0, has_teacher=False)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(throughput, "time", SimpleNamespace(monotonic=clock))
    return clock


def test_rates_count_all_ranks_but_not_padding(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    other = (Work(samples=8, tokens=1200), 600)
    monkeypatch.setattr(dist, "gather_on_host", lambda mine: [mine, other])
    speed = Throughput(FLOPS, peak=None)
    for _ in range(2):
        clock.now += 4.0
        speed.add(Work(samples=8, tokens=300), padding=0)
    assert speed.take() == {
        "speed/s_per_step": 4.0,
        "speed/samples_per_s": 3.0,
        "speed/tokens_per_s": 225.0,
        "data/padding": 0.25,
    }


def test_mfu_is_of_the_peak_of_all_ranks(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dist, "gather_on_host", lambda mine: [mine, mine])
    speed = Throughput(FLOPS, peak=1e12)
    speed.add(Work(samples=1, tokens=1000), padding=0)
    with speed.paused():
        clock.now += 100.0
    clock.now += 10.0
    metrics = speed.take()
    assert metrics["speed/mfu"] == pytest.approx(6 * 10**9 * 1000 / 1e13)
    assert metrics["speed/mfu_matmul"] > 0


def test_counting_starts_again_after_each_look(clock: Clock) -> None:
    speed = Throughput(FLOPS, peak=None)
    clock.now += 50
    speed.add(Work(samples=1, tokens=1), padding=9)
    speed.take()
    clock.now += 2
    speed.add(Work(samples=4, tokens=6), padding=0)
    assert list(speed.take().values()) == [2.0, 2.0, 3.0, 0.0]


def test_no_steps_are_no_error(clock: Clock) -> None:
    assert Throughput(FLOPS, peak=1e12).take()["speed/tokens_per_s"] == 0.0


def test_a_cpu_has_no_mfu_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "ilvr_ds")
    assert peak_flops(torch.device("cpu")) is None
    assert "no speed/mfu: the peak of a CPU is not in the table" in caplog.text


def test_weights_count_whole_where_they_are_sharded() -> None:
    """ZeRO-3 leaves empty tensors behind; their whole size is an attribute."""
    config: Any = SimpleNamespace(
        model_type="qwen2_5_vl",
        text_config=SimpleNamespace(
            hidden_size=8, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1, intermediate_size=8,
            vocab_size=16,
        ),
        vision_config=SimpleNamespace(
            hidden_size=8, depth=1, num_heads=1, intermediate_size=8, out_hidden_size=8, fullatt_block_indexes=[],
            patch_size=2, temporal_patch_size=2, spatial_merge_size=2,
        ),
        tie_word_embeddings=True,
    )  # fmt: skip
    student = torch.nn.Module()
    student.sharded = torch.nn.Parameter(torch.empty(0))
    student.sharded.ds_numel = 30  # type: ignore[attr-defined]
    student.frozen = torch.nn.Parameter(torch.empty(5), requires_grad=False)
    student.model = SimpleNamespace(config=SimpleNamespace(text_config=SimpleNamespace(vocab_size=64)))
    flops = model_flops(student, config, has_teacher=True)
    assert (flops.trained, flops.frozen, flops.geometry.text.vocab_size) == (30, 5, 64)
