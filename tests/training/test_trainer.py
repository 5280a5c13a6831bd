"""When a run evaluates, draws and saves: the real loop and record around stand-ins that note what they are told."""

from __future__ import annotations

import dataclasses
import os
import signal
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from ilvr_ds.config import EvaluationConfig, Recipe, RunConfig, TrackingConfig
from ilvr_ds.tracking.record import Record
from ilvr_ds.tracking.tracker import Tracker, TrackingTarget
from ilvr_ds.training.best import Best
from ilvr_ds.training.components import Components
from ilvr_ds.training.trainer import Trainer

STEPS = 6


class Killed(BaseException):
    """As SIGKILL: nothing is done any more."""


class Saver:
    """Stands where checkpoints are saved: a file with the number of steps."""

    def __init__(self, run: Run) -> None:
        self.run, self.step = run, -1

    def begin(self, done: int, is_last: bool = False) -> None:
        if done != self.step:
            self.run.note("save")
            self.run.file.write_text(str(done))
            self.step = done

    def finish(self, is_last: bool = False) -> None: ...

    def keep_best(self, best: dict[str, Any]) -> None:
        self.run.told.append(f"best {best['step']}")


class Run(Trainer):
    """A trainer whose steps, evaluations, pictures and checkpoints are entries in `told`."""

    def __init__(
        self, folder: Path, told: list[str], stop_after: int = 0, killed_in: str = "", stopped_in: str = "",
        best: Best | None = None, losses: tuple[float, ...] = (),
    ) -> None:  # fmt: skip
        self.losses, self.moves = list(losses), 0
        self.lines: list[int] = []
        recipe = dataclasses.replace(
            Recipe(),
            run=RunConfig(name="run", output_dir=str(folder)),
            evaluation=EvaluationConfig(every_steps=2),
            tracking=TrackingConfig(pictures_every_steps=2),
        )
        recipe.run_dir.mkdir(exist_ok=True)
        target = TrackingTarget(None, "exp", "run", folder)
        tracker: Any = Tracker(recipe.run_dir, target, params={}, tags={}, is_writer=False)
        tracker._record = Record(recipe.run_dir / "metrics.jsonl")
        tracker._shipper = SimpleNamespace(wake=lambda: None)
        super().__init__(
            Components(
                recipe=recipe, loader=self, step=SimpleNamespace(student=None, teacher=None, sums=[], phases=self),
                networks=None, held_out=self.held_out, tracker=tracker, pictures=self.Pictures(self),
                writer=None, watchdog=SimpleNamespace(at=self.at), speed=self, total_steps=STEPS,
                rehearsal=None, quarantine=SimpleNamespace(exceeded=False, check=lambda: None),
                best=best or Best(),
            )  # type: ignore[arg-type]
        )  # fmt: skip
        self.saver: Any = Saver(self)
        self.told, self.stop_after, self.killed_in, self.stopped_in = told, stop_after, killed_in, stopped_in
        self.file = folder / "saved"

    def at(self, step: int, phase: str) -> None:
        if phase == "evaluation":
            assert self.told[-1] == f"evaluate {step}"
            self.moves += 1

    def note(self, what: str) -> None:
        self.told.append(f"{what} {self.done}")
        if self.told[-1] == self.killed_in:
            raise Killed

    # stand-ins of parts
    class Pictures:
        def __init__(self, run: Run) -> None:
            self.run = run

        def __call__(self, done: int) -> None:
            self.run.note("draw")
            self.run.tracker.picture(done, "curves", "curves.png", 0.1)

        def finish(self) -> None: ...

    def held_out(self, is_stopped: Callable[[], bool], moved: Callable[[], None]) -> dict[str, float] | None:
        assert not is_stopped()
        self.note("evaluate")
        moved()
        if self.told[-1] == self.stopped_in:
            os.kill(os.getpid(), signal.SIGTERM)
        return None if is_stopped() else {"eval/ce": self.losses.pop(0) if self.losses else 1.0}

    def windows(self, total: int) -> Any:
        return ((step, None) for step in range(self.done, total))

    def around(self, _: str, windows: Any) -> Any:
        return windows

    def start(self) -> None: ...

    # what the loop calls
    def _away(self, phase: str) -> Any:
        return pytest.MonkeyPatch.context()  # any context

    def _train_step(self, step: int, window: Any) -> None: ...

    def _agree(self) -> bool:
        return bool(self.stop_after) and self.done >= self.stop_after

    def _log(self, done: int) -> None:
        self.lines.append(done)

    def _restore(self) -> None:
        if self.file.exists():
            self.done = self.saver.step = int(self.file.read_text())
            self.parts.checkpoint = self.recipe.run_dir / "checkpoints/step"


def go(folder: Path, **more: Any) -> tuple[bool | None, list[str]]:
    """What a start did, and whether the run is finished; None: it was killed."""
    told: list[str] = []
    try:
        return Run(folder, told, **more).fit(), told
    except Killed:
        return None, told


DUE = ["evaluate 2", "draw 2", "evaluate 4", "draw 4", "save 6", "evaluate 6", "draw 6"]


def test_a_run_that_nothing_disturbs(tmp_path: Path) -> None:
    assert go(tmp_path) == (True, ["draw 0", *DUE])
    assert go(tmp_path) == (True, []), "nothing is left to do"


@pytest.mark.parametrize("what", ["evaluate", "draw"])
def test_what_a_kill_at_the_end_left_undone_is_done_by_the_next_start(tmp_path: Path, what: str) -> None:
    """Catches a run that is called finished without its last evaluation."""
    assert go(tmp_path, killed_in=f"{what} 6")[0] is None
    undone = ["evaluate 6", "draw 6"] if what == "evaluate" else ["draw 6"]
    assert go(tmp_path, killed_in=f"{what} 6") == (None, undone[:1])
    assert go(tmp_path) == (True, undone)
    assert go(tmp_path) == (True, [])


@pytest.mark.parametrize("stop_after", [3, 4])
def test_a_stop_saves_first_and_the_next_start_does_what_was_due(tmp_path: Path, stop_after: int) -> None:
    """Catches a job that is killed in an evaluation, before it has saved; and an evaluation that never comes."""
    assert go(tmp_path, stop_after=stop_after) == (False, ["draw 0", "evaluate 2", "draw 2", f"save {stop_after}"])
    assert go(tmp_path) == (True, DUE[2:])


def test_a_stop_at_the_last_step_leaves_the_evaluation_to_the_next_start(tmp_path: Path) -> None:
    finished, told = go(tmp_path, stop_after=STEPS)
    assert (finished, told[-1]) == (False, "save 6")
    assert go(tmp_path, stop_after=STEPS) == (True, ["evaluate 6", "draw 6"])


@pytest.mark.parametrize("when", [4, STEPS])
def test_a_signal_ends_an_evaluation_which_the_next_start_does_again(tmp_path: Path, when: int) -> None:
    """Catches a job that is killed in an evaluation whose end it waits for, with steps that were not saved."""
    done = ["draw 0", *DUE[: DUE.index(f"evaluate {when}") + 1], *([] if when == STEPS else [f"save {when}"])]
    assert go(tmp_path, stopped_in=f"evaluate {when}") == (False, done)
    assert go(tmp_path, stopped_in=f"evaluate {when}") == (False, [f"evaluate {when}"]), "and before the first step"
    assert go(tmp_path) == (True, DUE[DUE.index(f"evaluate {when}") :])


def test_what_another_run_had_due_is_not_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches an evaluation at the first start from another run's checkpoint, which nobody asked for."""
    restore = Run._restore

    def elsewhere(self: Run) -> None:
        restore(self)
        self.parts.checkpoint = tmp_path / "other/checkpoints/step"

    monkeypatch.setattr(Run, "_restore", elsewhere)
    (tmp_path / "saved").write_text("4")
    assert go(tmp_path) == (True, DUE[4:])


def test_the_best_evaluation_is_saved(tmp_path: Path) -> None:
    """The last one comes after the last checkpoint, which is then the best."""
    told = go(tmp_path, best=Best("eval/ce"), losses=(2.0, 3.0, 1.0))[1]
    assert [what for what in told if what.startswith(("best", "save"))] == ["best 2", "save 6", "best 6"]


def test_an_evaluation_tells_the_watchdog_that_it_moves(tmp_path: Path) -> None:
    """One that takes longer than run.stall_timeout_s would end the job, and so would the next start's."""
    run = Run(tmp_path, [])
    assert run.fit() and run.moves == 3


def test_a_run_ends_when_evaluations_get_no_better(tmp_path: Path) -> None:
    """It is finished: what is left to do is done, and the next start finds nothing."""
    best = Best("eval/ce", patience=1)
    finished, told = go(tmp_path, best=best, losses=(2.0, 3.0))
    assert finished and told == ["draw 0", "evaluate 2", "best 2", "draw 2", "evaluate 4", "draw 4", "save 4"]
    assert go(tmp_path, best=best) == (True, []), "with what the checkpoint knows"


def test_the_last_steps_of_a_run_that_ends_early_are_logged(tmp_path: Path) -> None:
    """tracking.every_steps is 10 here; the last of a whole run always were."""
    for name in ("early", "whole", "stopped"):
        (tmp_path / name).mkdir()
    run = Run(tmp_path / "early", [], best=Best("eval/ce", patience=1), losses=(2.0, 3.0))
    assert run.fit() and run.lines == [4]
    run = Run(tmp_path / "whole", [])
    assert run.fit() and run.lines == [6]
    run = Run(tmp_path / "stopped", [], stop_after=3)
    assert not run.fit() and run.lines == [3]


def test_a_stop_before_patience_ends_is_a_stop(tmp_path: Path) -> None:
    finished, told = go(tmp_path, stop_after=3, best=Best("eval/ce", patience=1), losses=(2.0, 3.0))
    assert (finished, told[-1]) == (False, "save 3")


def test_patience_that_an_evaluation_at_the_start_ends_is_at_an_end(tmp_path: Path) -> None:
    """The start before left it when it was told to stop. No step is done more than without the stop."""
    best = Best("eval/ce", patience=1)
    best.add(2, {"eval/ce": 2.0})
    assert go(tmp_path, stop_after=4, best=Best())[1][-1] == "save 4"
    assert go(tmp_path, best=best, losses=(3.0,)) == (True, ["evaluate 4", "draw 4"])
