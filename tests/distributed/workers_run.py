"""Whole training runs on the test's ranks, through the same code as `ilvr-ds train`."""

from __future__ import annotations

import dataclasses
import os
import signal
from pathlib import Path
from typing import Any

import torch
from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

from ilvr_ds import dist
from ilvr_ds.checkpoint import files
from ilvr_ds.config import load_recipe
from ilvr_ds.engine.networks import init_process_group
from ilvr_ds.errors import UserError
from ilvr_ds.monitoring.stop_signal import StopSignal
from ilvr_ds.training import run
from ilvr_ds.training.assembly import assemble
from ilvr_ds.training.saving import Saver
from ilvr_ds.training.stage1 import StageOneStep
from ilvr_ds.training.trainer import Trainer


def train(recipe: str, overrides: list[str], stop_after: int = 0) -> dict[str, Any]:
    """Run a recipe; with `stop_after` the run is asked to stop after so many steps, as a signal would.

    Returns what must be equal between a run in one piece and a resumed one, and the metrics of the record.
    """
    init_process_group()
    parts = assemble(load_recipe(recipe, overrides), Path(recipe))
    trainer = Trainer(parts)
    if stop_after:
        after = trainer._after_step

        def stopping(done: int) -> bool:
            trainer.signal.requested = done >= stop_after
            return after(done)

        trainer._after_step = stopping  # type: ignore[method-assign]
    finished = trainer.fit()
    parts.tracker.close("FINISHED" if finished else "KILLED")
    student = parts.step.student
    weights, moments = {}, {}
    for name, parameter in student.module.named_parameters():
        if not parameter.requires_grad:
            continue
        weights[name] = safe_get_full_fp32_param(parameter).clone()
        moments[name] = safe_get_full_optimizer_state(parameter, "exp_avg_sq").clone()
    return {
        "finished": finished,
        "weights": weights,
        "moments": moments,
        "teacher": [shard.clone() for shard in parts.step.teacher.state()] if parts.step.teacher else [],
        "loader": parts.loader.state_dict(),
        "random": torch.get_rng_state(),
        "optimizer": [{k: g[k] for k in ("betas", "eps", "weight_decay")} for g in student.optimizer.param_groups],
        "clip_grad": student.optimizer.clip_grad,
        "recipe": dataclasses.asdict(parts.recipe),
    }


def train_until_a_signal(recipe: str, overrides: list[str], rank: int, step: int) -> dict[str, Any]:
    """The same, where rank `rank` alone gets SIGUSR1 while it computes step `step`, counted from 1."""
    before = Trainer._train_step

    def signalled(self: Trainer, number: int, window: Any) -> None:
        if (dist.rank(), number + 1) == (rank, step):
            os.kill(os.getpid(), signal.SIGUSR1)
        before(self, number, window)

    Trainer._train_step = signalled  # type: ignore[method-assign]
    try:
        return train(recipe, overrides)
    finally:
        Trainer._train_step = before  # type: ignore[method-assign]


def states_around_a_skipped_step(recipe: str, overrides: list[str], rank: int, step: int) -> list[dict[str, Any]]:
    """This rank's teacher and student after each step, where the loss of rank `rank` is not a number in step `step`."""
    states: list[dict[str, Any]] = []
    loss, after = StageOneStep.loss, Trainer._after_step

    def bad_once(self: StageOneStep, micro: Any, prepared: Any, number: int, totals: Any) -> torch.Tensor:
        value = loss(self, micro, prepared, number, totals)
        return value * float("nan") if (dist.rank(), number + 1) == (rank, step) else value

    def noted(self: Trainer, done: int) -> bool:
        assert self.teacher is not None
        weights = [safe_get_full_fp32_param(p).clone() for p in self.student.module.parameters() if p.requires_grad]
        teacher = [shard.clone() for shard in self.teacher.state()]
        states.append({"student": weights, "teacher": teacher, "skipped": self.student.skipped_steps})
        return after(self, done)

    StageOneStep.loss, Trainer._after_step = bad_once, noted  # type: ignore[method-assign]
    try:
        train(recipe, overrides)
    finally:
        StageOneStep.loss, Trainer._after_step = loss, after  # type: ignore[method-assign]
    return states


def mistake(recipe: str, overrides: list[str]) -> str:
    """What a run ends with."""
    try:
        train(recipe, overrides)
    except UserError as error:
        return str(error)
    return ""


def fault_seen_by_one_rank(path: str) -> str | None:
    """`first_fault` where the last rank alone cannot read the state; then an exchange that all must be in step for."""
    init_process_group()

    def unreadable(_: Path) -> dict[str, Any]:
        raise OSError(116, "Stale file handle")

    before = files._read_state
    if dist.rank() == dist.world_size() - 1:
        files._read_state = unreadable
    found = files.first_fault(Path(path))
    files._read_state = before
    assert dist.gather_on_host(found) == [found] * dist.world_size()
    return found


def handlers_while_saving(recipe: str, overrides: list[str]) -> list[bool]:
    """For each checkpoint that is begun or finished, whether a signal then asks to stop, and does not kill."""
    found = []

    def noting(method: Any) -> Any:
        def noted(self: Saver, *arguments: Any, **named: Any) -> None:
            handler = signal.getsignal(signal.SIGUSR1)
            found.append(isinstance(getattr(handler, "__self__", None), StopSignal))
            method(self, *arguments, **named)

        return noted

    before = Saver.begin, Saver.finish
    Saver.begin, Saver.finish = noting(before[0]), noting(before[1])  # type: ignore[method-assign]
    try:
        train(recipe, overrides)
    finally:
        Saver.begin, Saver.finish = before  # type: ignore[method-assign]
    return found


def train_unrehearsed(recipe: str, overrides: list[str]) -> dict[str, Any]:
    """The same without the rehearsal of the longest sample."""
    rehearse = Trainer._rehearse
    Trainer._rehearse = lambda self: None  # type: ignore[method-assign]
    try:
        return train(recipe, overrides)
    finally:
        Trainer._rehearse = rehearse  # type: ignore[method-assign]


def refused(recipe: str, overrides: list[str]) -> str:
    """What `ilvr-ds train` says where the run is being trained."""
    try:
        run.train(load_recipe(recipe, overrides), Path(recipe))
    except UserError as error:
        return str(error)
    return ""
