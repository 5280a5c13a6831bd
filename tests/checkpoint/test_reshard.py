"""Slices of the teacher's averages cut anew for another number of ranks, and counters that sub-groups shared."""

from __future__ import annotations

import dataclasses
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from ilvr_ds import dist
from ilvr_ds.checkpoint import reshard
from ilvr_ds.checkpoint.files import teacher_file
from ilvr_ds.checkpoint.layout import Layout
from ilvr_ds.checkpoint.reshard import _own_step_counters, needs_resharding, teacher_slices
from ilvr_ds.config import OptimConfig
from ilvr_ds.errors import UserError
from tests.checkpoint.stand_ins import make_folder, recipe

LENGTHS = {"long": 23, "short": 2, "even": 12}


def cut(weight: torch.Tensor, rank: int, world: int) -> torch.Tensor:
    """A rank's even part, padded with zeros: as ZeRO-3 cuts."""
    size = -(-len(weight) // world)
    return torch.nn.functional.pad(weight, (0, size * world - len(weight)))[rank * size : (rank + 1) * size].clone()


@pytest.mark.parametrize("before", [1, 2, 3, 5])
@pytest.mark.parametrize("now", [1, 2, 4])
def test_slices_are_those_of_the_whole_weight(
    before: int, now: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a piece of another rank, one that is left out, and the old padding within a weight."""
    weights = {name: torch.arange(1.0, length + 1) for name, length in LENGTHS.items()}
    for rank in range(before):
        save_file({name: cut(w, rank, before) for name, w in weights.items()}, tmp_path / teacher_file(rank))
    for rank in range(now):
        monkeypatch.setattr(dist, "rank", lambda rank=rank: rank)
        wanted = [cut(weight, rank, now) for weight in weights.values()]
        found = teacher_slices(tmp_path, list(LENGTHS), [len(part) for part in wanted], before)
        assert all(map(torch.equal, found, wanted))


def test_a_teacher_of_other_weights_is_a_mistake(tmp_path: Path) -> None:
    save_file({"long": torch.ones(2)}, tmp_path / teacher_file(0))
    with pytest.raises(UserError, match="the stored teacher has other weights than this recipe trains"):
        teacher_slices(tmp_path, ["long", "short"], [2, 2], 1)


def test_a_conversion_writes_into_the_run_that_goes_on_alone(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches two runs that go on from one checkpoint, and convert it in one place."""
    source = tmp_path / "other/checkpoints/step-00000003"
    make_folder(source)
    before = sorted(tmp_path.rglob("*"))

    def full(settings: Namespace) -> None:
        Path(settings.output_folder).mkdir(parents=True)
        raise OSError("no space left")

    monkeypatch.setattr(reshard, "convert_to_universal", full)
    with pytest.raises(UserError, match=r"run/checkpoints/universal\.partial: no space left; conversion needs room"):
        reshard.reshard(
            source, {"world_size": 2, "zero_stage": 3, "layout": {}}, Layout(3, {}), recipe(folder, str(source))
        )
    written = [path for path in sorted(tmp_path.rglob("*")) if path not in before]
    assert written == [folder.parent, folder, folder / "universal.partial"]


def test_a_conversion_of_8_bit_states_is_a_mistake_that_names_the_layout(folder: Path) -> None:
    """Catches keys beside the stage that change the layout and are not looked at."""
    state = {"world_size": 1, "zero_stage": 3, "layout": {"sub_group_size": 10**9}}
    assert not needs_resharding(state, Layout.of({"stage": 3}))
    assert not needs_resharding(state, Layout.of({"stage": 3, "sub_group_size": 1e9}))
    stage = Layout.of({"stage": 3, "sub_group_size": 20000})
    assert needs_resharding(state, stage)
    now = dataclasses.replace(recipe(folder, "auto"), optim=OptimConfig(name="adamw_8bit"))
    with pytest.raises(
        UserError,
        match=r"saved by 1 rank under ZeRO-3 with sub_group_size 1000000000, this job has 1 under ZeRO-3 with "
        "sub_group_size 20000; the state of adamw_8bit cannot be split",
    ):
        reshard.reshard(folder, state, stage, now)


def test_sub_groups_count_steps_of_their_own() -> None:
    """Catches a step counter that is counted up once for each of them."""
    weights = [torch.nn.Parameter(torch.ones(2)) for _ in range(3)]
    optimizer = torch.optim.AdamW(weights)
    counter = torch.tensor(7.0)
    for weight in weights:
        optimizer.state[weight]["step"] = counter
    _own_step_counters(optimizer)
    optimizer.state[weights[0]]["step"] += 1
    assert [float(optimizer.state[weight]["step"]) for weight in weights] == [8, 7, 7]
