"""One optimizer step of the loop, networks stood in for: what the engine is told, and what a bad step costs."""

from __future__ import annotations

from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from ilvr_ds import dist
from ilvr_ds.config import CheckpointConfig, EvaluationConfig, OptimConfig, TrackingConfig
from ilvr_ds.engine.schedule import learning_rate
from ilvr_ds.errors import RunError
from ilvr_ds.monitoring.metric_sums import MetricSums
from ilvr_ds.training import trainer as module
from ilvr_ds.training.skipped_steps import SkippedSteps
from ilvr_ds.training.trainer import Trainer

OPTIM = OptimConfig(lr=1.0, warmup_steps=3, schedule="linear")
TOTAL = 10


class Engine:
    """Notes what it is told; steps whose number stands in `bad` are skipped."""

    def __init__(self, bad: tuple[int, ...] = ()) -> None:
        self.optimizer = SimpleNamespace(param_groups=[{"lr": None}, {"lr": None}])
        self.bad, self.skipped_steps, self.number = bad, 0, -1
        self.is_boundary = False
        self.calls: list[tuple[Any, ...]] = []

    def set_gradient_accumulation_boundary(self, is_boundary: bool) -> None:
        self.is_boundary = is_boundary

    def backward(self, loss: torch.Tensor, scale_wrt_gas: bool) -> None:
        self.calls.append(("backward", float(loss), scale_wrt_gas, self.is_boundary))

    def step(self) -> None:
        self.calls.append(("step", *(group["lr"] for group in self.optimizer.param_groups)))
        self.number += self.is_boundary
        self.skipped_steps += self.is_boundary and self.number in self.bad


def loop(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A trainer around the engine, with two micro-batches a step whose loss is 1 and 2."""
    monkeypatch.setattr(module, "work_of", lambda window: None)
    trainer: Any = Trainer.__new__(Trainer)
    trainer.recipe = SimpleNamespace(optim=OPTIM)
    trainer.total_steps = TOTAL
    trainer.student, trainer.totals = engine, MetricSums(["loss"], torch.device("cpu"))
    trainer.followed, trainer.events = [], []
    trainer.teacher = SimpleNamespace(mark_stale=lambda: trainer.followed.append(engine.number))
    trainer.phases = lambda name: nullcontext()
    trainer.watchdog = SimpleNamespace(at=lambda *_: None)
    trainer.speed = SimpleNamespace(add=lambda *_: None)
    trainer.tracker = SimpleNamespace(event=lambda name, step: trainer.events.append((name, step)))
    saver: Any = SimpleNamespace(finish=lambda: None)
    trainer.skipped = SkippedSteps(trainer.tracker, saver, most=2)

    def loss(micro: Any, prepared: Any, step: int, totals: MetricSums) -> torch.Tensor:
        value = torch.tensor(float("nan") if step in engine.bad else float(micro.ids[0]))
        totals.add({"loss": value})
        return value

    trainer.step = SimpleNamespace(prepare=lambda window: SimpleNamespace(window=window), loss=loss)
    return trainer


def window() -> Any:
    micro_batches = tuple(SimpleNamespace(ids=(name,)) for name in ("1", "2"))
    made: Any = SimpleNamespace(ids=("1", "2"), micro_batches=micro_batches, bad=(), retries=0, num_padding=0)
    made.to = lambda device: made
    return made


def test_the_engine_is_told_the_rate_of_the_step_and_its_last_micro_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a rate that is not the logged one, an early step, and losses that are divided again."""
    engine = Engine()
    trainer = loop(engine, monkeypatch)
    monkeypatch.setattr(dist, "world_size", lambda: 4)
    for step in (0, 1, 7):
        engine.calls.clear()
        trainer._train_step(step, window())
        rate = learning_rate(OPTIM, step, TOTAL)
        assert engine.calls == [
            ("backward", 4.0, False, False), ("step", rate, rate), ("backward", 8.0, False, True), ("step", rate, rate),
        ]  # fmt: skip
    assert trainer.followed == [0, 1, 2], "the teacher follows after each step"
    assert trainer.totals.values.tolist() == [9.0]


def test_a_skipped_step_leaves_no_trace_but_its_event(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a mean loss that is not a number ever after, and a teacher that follows."""
    trainer = loop(Engine(bad=(1,)), monkeypatch)
    for step in range(3):
        trainer._train_step(step, window())
    assert trainer.followed == [0, 2] and trainer.events == [("skipped_step", 2)]
    assert trainer.totals.take() == {"loss": 6.0}
    assert trainer.skipped.in_a_row == 0


def test_skipped_steps_in_a_row_end_the_run_and_name_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = loop(Engine(bad=(1, 3, 4)), monkeypatch)
    for step in range(4):
        trainer._train_step(step, window())
    with pytest.raises(RunError, match=r"step 5: the gradients were not finite in 2 steps in a row .*: samples 1, 2;"):
        trainer._train_step(4, window())


def schedule(monkeypatch: pytest.MonkeyPatch) -> tuple[Any, list[tuple[str, int]]]:
    """A trainer of 6 steps that notes what it would do after each."""
    calls: list[tuple[str, int]] = []
    for name in ("_log", "_evaluate", "_draw"):
        monkeypatch.setattr(Trainer, name, lambda self, done, name=name: not calls.append((name, done)))
    trainer: Any = Trainer.__new__(Trainer)
    trainer.recipe = SimpleNamespace(
        tracking=TrackingConfig(every_steps=4, pictures_every_steps=3),
        evaluation=EvaluationConfig(every_steps=2),
        checkpoint=CheckpointConfig(every_steps=3),
    )
    trainer.total_steps = 6
    trainer.parts = SimpleNamespace(held_out=True, writer=SimpleNamespace(is_written=False))
    trainer.saver = SimpleNamespace(begin=lambda done: calls.append(("save", done)))
    trainer.quarantine = SimpleNamespace(
        exceeded=False, max_fraction=0.1, check=lambda: None, add=lambda *arguments: calls.append(("bad", arguments[1]))
    )
    trainer.signal = SimpleNamespace(requested=False)
    trainer.reading, trainer.done = ((), 0), 4
    trainer.loader = SimpleNamespace(samples_of=lambda step: {3: (5, 3)}[step])
    return trainer, calls


def test_what_is_due_after_each_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a checkpoint, an evaluation or pictures at another step; those of the last are done behind the loop."""
    trainer, calls = schedule(monkeypatch)
    found = {}
    for done in range(1, 7):
        calls.clear()
        assert not trainer._after_step(done)
        found[done] = [name for name, step in calls if step == done and name != "bad"]
    assert found == {1: [], 2: ["_evaluate"], 3: ["_draw", "save"], 4: ["_log", "_evaluate"], 5: [], 6: ["_log"]}


def test_a_wish_of_any_rank_stops_all_and_logs_the_last_step(monkeypatch: pytest.MonkeyPatch) -> None:
    trainer, calls = schedule(monkeypatch)
    for asked in ((False, True), (True, False)):
        ranks = [(is_asked, False, (number,), 1) for number, is_asked in enumerate(asked)]
        monkeypatch.setattr(dist, "gather_on_host", lambda mine, ranks=ranks: ranks)
        calls.clear()
        assert trainer._after_step(5)
        assert ("_log", 5) in calls


def test_what_all_ranks_read_badly_is_counted_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches the bad samples of this rank alone: ranks would come to different decisions."""
    trainer, _ = schedule(monkeypatch)
    added: list[Any] = []
    trainer.quarantine.add = lambda *arguments: added.append(arguments)
    monkeypatch.setattr(
        dist, "gather_on_host", lambda mine: [mine, (False, False, ("a", "b"), 3), (False, False, ("c",), 1)]
    )
    assert not trainer._agree()
    assert added == [(["a", "b", "c"], (5, 3), 4)], "of the step that was done last, by data set"
