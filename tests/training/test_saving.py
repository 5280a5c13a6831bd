"""When a checkpoint is begun and what is recorded of it, around a writer that does what it is told."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from ilvr_ds.checkpoint.best import read_best, write_best
from ilvr_ds.checkpoint.files import STATE_FILE, checkpoint_name
from ilvr_ds.config import Recipe, RunConfig
from ilvr_ds.errors import UserError
from ilvr_ds.training import saving
from ilvr_ds.training.best import Best
from ilvr_ds.training.saving import Saver, restore


class Writer:
    """Begins beside training, or writes at once; `errors` are those of the next checkpoints."""

    def __init__(self, is_beside: bool, errors: list[str | None]) -> None:
        self.is_beside, self.errors = is_beside, errors
        self.begun: list[int] = []
        self.is_open = False
        self.folder = Path()

    def start(self, step: int, state: dict[str, Any]) -> bool:
        assert state["loader"] == {"epoch": 1, "step": step}
        self.begun.append(step)
        self.is_open = True
        return self.is_beside

    def finish(self) -> tuple[str | None, str | None]:
        if not self.is_open:
            return None, None
        self.is_open = False
        error = self.errors.pop(0)
        return (None, error) if error else (f"step-{self.begun[-1]}", None)


def saver_of(is_beside: bool, *errors: str | None) -> tuple[Saver, Writer, list[Any]]:
    """A saver, its writer, and what is recorded, without the seconds that training waited."""
    recorded: list[Any] = []
    writer = Writer(is_beside, list(errors))
    tracker = SimpleNamespace(
        run_id=None,
        event=lambda name, step, **_: recorded.append((name, step)),
        log=lambda step, metrics: recorded.extend((step, v) for k, v in metrics.items() if k == "checkpoint/saved"),
    )
    parts: Any = SimpleNamespace(
        recipe=Recipe(), loader=SimpleNamespace(state_dict=lambda: {"epoch": 1, "step": 0}), writer=writer,
        networks=SimpleNamespace(zero_stage=3, layout=SimpleNamespace(settings={})),
        quarantine=SimpleNamespace(state_dict=dict), base={}, tracker=tracker,
        step=SimpleNamespace(phases=lambda name: nullcontext()), watchdog=SimpleNamespace(at=lambda *_: None),
        speed=SimpleNamespace(paused=nullcontext), best=Best(),
    )  # fmt: skip
    return Saver(parts), writer, recorded


@pytest.mark.parametrize("is_beside", [True, False])
def test_a_step_is_saved_once_and_what_is_under_way_is_finished_first(is_beside: bool) -> None:
    """Catches two checkpoints under way, and the last step saved again."""
    saver, writer, recorded = saver_of(is_beside, None, None)
    for done in (3, 3, 6, 6):
        saver.begin(done)
    saver.finish(is_last=True)
    assert writer.begun == [3, 6]
    assert recorded == [("checkpoint", 3), (3, 1.0), ("checkpoint", 6), (6, 1.0)]


@pytest.mark.parametrize("is_beside", [True, False])
def test_one_that_fails_is_recorded_and_tried_again(is_beside: bool) -> None:
    """Catches a step that counts as saved though nothing was written."""
    saver, writer, recorded = saver_of(is_beside, "no room", None)
    saver.begin(3)
    saver.finish()
    assert saver.step == -1 and recorded == [("checkpoint_failed", 3), (3, 0.0)]
    saver.begin(3)
    saver.finish()
    assert writer.begun == [3, 3] and recorded[2:] == [("checkpoint", 3), (3, 1.0)]


@pytest.mark.parametrize("is_beside", [True, False])
def test_the_last_one_must_be_written(is_beside: bool) -> None:
    saver, _, recorded = saver_of(is_beside, "no room")
    with pytest.raises(UserError, match="the checkpoint after step 6 could not be written: no room"):
        saver.begin(6, is_last=True)
        saver.finish(is_last=True)
    assert recorded == [("checkpoint_failed", 6), (6, 0.0)]


def found(step: int) -> dict[str, Any]:
    return {"metric": "eval/ce", "value": 1.0, "step": step}


@pytest.mark.parametrize("is_beside", [True, False])
def test_the_best_is_named_when_it_is_whole(is_beside: bool, tmp_path: Path) -> None:
    """Catches a name for a checkpoint that is still being written, or was never begun."""
    saver, writer, _ = saver_of(is_beside, None, None)
    writer.folder = tmp_path
    saver.begin(3)
    saver.keep_best(found(6))
    assert writer.begun == [3, 6] and (read_best(tmp_path) is None) == is_beside
    saver.finish()
    assert read_best(tmp_path) == found(6)
    saver.keep_best(found(6))
    assert writer.begun == [3, 6], "an evaluation after the last checkpoint: it is saved already"


@pytest.mark.parametrize("is_beside", [True, False])
def test_a_best_that_fails_is_not_named(is_beside: bool, tmp_path: Path) -> None:
    saver, writer, _ = saver_of(is_beside, None, "no room", None)
    writer.folder = tmp_path
    (tmp_path / checkpoint_name(3)).mkdir()
    (tmp_path / checkpoint_name(3) / STATE_FILE).touch()
    best = saver.parts.best = Best("eval/ce", patience=2)
    for step, value in ((3, 2.0), (6, 1.0)):
        assert best.add(step, {"eval/ce": value}) and best.found is not None
        saver.keep_best(best.found)
    saver.begin(9)
    saver.finish()
    assert read_best(tmp_path) == best.found == {**found(3), "value": 2.0}, "the next is compared with what was kept"
    assert best.add(12, {"eval/ce": 1.5}), "better than what was kept"


def test_a_best_that_fails_when_a_better_one_is_there_leaves_that(tmp_path: Path) -> None:
    """Beside training: the failure is met when the next is about to be saved."""
    saver, writer, _ = saver_of(True, "no room", None)
    writer.folder = tmp_path
    best = saver.parts.best = Best("eval/ce")
    for step, value in ((3, 2.0), (6, 1.0)):
        assert best.add(step, {"eval/ce": value}) and best.found is not None
        saver.keep_best(best.found)
    saver.finish()
    assert read_best(tmp_path) == best.found == found(6)


def restored(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    told: dict[str, Any],
    on_disk: dict[str, Any] | None,
    **recorded: Any,
) -> tuple[Best, Path]:
    """What a run that goes on from its checkpoint of step 4 takes for the best, and the folder of checkpoints."""
    recipe = replace(Recipe(), run=RunConfig(name="run", output_dir=str(tmp_path)))
    checkpoint = recipe.run_dir / "checkpoints" / checkpoint_name(4)
    checkpoint.mkdir(parents=True)
    (checkpoint / STATE_FILE).touch()
    if on_disk:
        write_best(checkpoint.parent, on_disk)
    state = {"loader": {}, "quarantine": {}, "best": told}
    monkeypatch.setattr(saving, "load_checkpoint", lambda *_: state)
    monkeypatch.setattr(saving, "apply_settings", lambda *_: None)
    parts: Any = SimpleNamespace(
        recipe=recipe, step=SimpleNamespace(student=None, teacher=None), is_resharded=False, total_steps=6,
        networks=SimpleNamespace(trained=[], teach_frozen=lambda: None), best=Best("eval/ce"),
        loader=SimpleNamespace(step=4, load_state_dict=lambda _: None),
        quarantine=SimpleNamespace(load_state_dict=lambda _: None),
        tracker=SimpleNamespace(evaluations=lambda: recorded.get("evaluations", [])),
    )  # fmt: skip
    assert restore(parts, checkpoint) == 4
    return parts.best, checkpoint.parent


def test_a_best_whose_run_was_killed_before_it_was_named_is_named_by_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The evaluation of step 4 is on record, and its checkpoint is whole; best.json still says step 2."""
    before = {"metric": "eval/ce", "value": 2.0, "step": 2}
    told = {"found": before, "since": 0, "last": 2, "metric": "eval/ce", "samples": ""}
    evaluations = [(2, {"eval/ce": 2.0}), (4, {"eval/ce": 1.0})]
    _, folder = restored(tmp_path, monkeypatch, told, before, evaluations=evaluations)
    assert read_best(folder) == {"metric": "eval/ce", "value": 1.0, "step": 4}


def test_a_best_whose_checkpoint_is_gone_is_not_compared_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The run went back behind a better one, for which the one of step 2 was deleted. Catches a run that keeps no best
    any more, and names one that cannot be exported."""
    told = {"found": found(2), "since": 1, "last": 4, "metric": "eval/ce", "samples": ""}
    best, _ = restored(tmp_path, monkeypatch, told, None)
    assert (best.found, best.since) == (None, 0) and best.add(6, {"eval/ce": 9.0})
