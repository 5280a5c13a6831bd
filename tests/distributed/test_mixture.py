"""Whole runs on a mixture of three data sets: killed and gone on, on one and two ranks, and other mixtures refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.test_faults import assert_same_states, finish, start
from tests.distributed.test_runs import losses, overrides
from tests.mixtures import SIZES, pack_sets, shards
from tests.ranks import run_ranks
from tests.recipes import RECIPE


@pytest.fixture(scope="module")
def sets(demo_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pack_sets(demo_folder, tmp_path_factory.mktemp("sets"))


def mixed(sets: Path, **changes: object) -> dict[str, object]:
    """Changes of the demo's settings: six steps of 8 samples in micro-batches filled by tokens."""
    return {
        "data__shards": shards(sets).removeprefix("data.shards="),
        "data__eval_shards": "null",
        "train__micro_batch_tokens": 1024,
        "train__micro_batch_size": 4,
        **changes,
    }


def metrics(folder: Path) -> dict[int, dict[str, float]]:
    found: dict[int, dict[str, float]] = {}
    for line in (folder / "demo/metrics.jsonl").read_text().splitlines():
        record: dict[str, Any] = json.loads(line)
        found.setdefault(record.get("step", -1), {}).update(record.get("metrics", {}))
    return found


@pytest.mark.drill
@pytest.mark.timeout(900)
@pytest.mark.parametrize("world", [1, 2])
def test_a_mixture_that_was_killed_ends_as_one_that_was_not(
    tmp_path: Path, demo_folder: Path, sets: Path, world: int
) -> None:
    """kill -9 within step 4, then a start as a scheduler makes it: weights, moments, teacher, losses and counts are
    bitwise those of a run in one piece."""
    changes = mixed(sets, train__grad_accum_steps=2 // world, world=world)
    for name in ("whole", "killed"):
        (tmp_path / name).mkdir()
    ranks, done = list(range(world)), [0] * world
    said = tmp_path / "whole/log-0"
    assert finish(start(tmp_path / "whole", demo_folder, "killed", 9, **changes), ranks) == done, said.read_text()
    finish(start(tmp_path / "killed", demo_folder, "killed", world - 1, **changes), ranks[-1:])
    assert finish(start(tmp_path / "killed", demo_folder, "killed", 9, **changes), ranks) == done
    assert "going on from " in (tmp_path / "killed/log-0").read_text()
    assert_same_states(*(tmp_path / name / "demo/checkpoints/step-00000006" for name in ("whole", "killed")))
    assert losses(tmp_path / "whole") == losses(tmp_path / "killed")
    whole, killed = metrics(tmp_path / "whole"), metrics(tmp_path / "killed")
    for step in range(1, 7):
        names = [name for name in whole[step] if "_by_set/" in name]
        assert len(names) >= 12 and {n: whole[step][n] for n in names} == {n: killed[step][n] for n in names}
    assert [whole[6][f"data/samples_by_set/{name}"] for name in SIZES] == [21, 11, 16]
    assert whole[6]["data/epochs_by_set/small"] == 2.0
    assert {name for name in whole[6] if name.startswith("eval/ce")} == {
        "eval/ce", "eval/ce_by_set/big", "eval/ce_by_set/small",
    }  # fmt: skip
    log = said.read_text()
    assert "mixture: big: 21 samples in 6 steps (43.8% of the run), 0.525 passes over its 40; 19 are never seen" in log
    assert "of the mixture: small: 16 samples in 6 steps (33.3% of the run), 2 passes over its 8" in log


@pytest.mark.drill
@pytest.mark.timeout(900)
def test_another_mixture_does_not_go_on_from_a_checkpoint(tmp_path: Path, demo_folder: Path, sets: Path) -> None:
    """Catches an order that silently changes in the middle of a run; a renamed set is the same mixture."""
    settings = [*overrides(tmp_path, demo_folder, **mixed(sets, train__max_steps=1))]
    run_ranks("tests.distributed.workers_run:train", 1, tmp_path / "1", 600, recipe=RECIPE, overrides=settings)
    was = "made with 0.4444 big + 0.2222 middle + 0.3333 small, 64 samples an epoch"
    settings += ["train.max_steps=2", "checkpoint.resume=must"]
    for change, words in {
        shards(sets, small="weight: 3"): "this run has 0.3333 big + 0.1667 middle + 0.5 small, 64 samples an epoch; go",
        shards(sets, *["epochs: 1"] * 3): "this run has 0.625 big + 0.25 middle + 0.125 small, 64 samples an epoch; go",
        f"data.shards={sets}/big/train": "this run has one data set and no mixture; go on with the mixture of then",
    }.items():
        said = run_ranks(
            "tests.distributed.workers_run:mistake", 1, tmp_path / "2", recipe=RECIPE, overrides=[*settings, change]
        )[0]
        assert said.startswith("data.shards: the checkpoint was ") and was in said and words in said, said
    renamed = shards(sets).replace("name: middle", "name: other")
    [result] = run_ranks(
        "tests.distributed.workers_run:train", 1, tmp_path / "3", recipe=RECIPE, overrides=[*settings, renamed]
    )
    assert result["finished"] and result["loader"]["step"] == 2
