"""Training on stored features, on real ranks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from deepspeed.utils import safe_get_full_grad
from torch import Tensor
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLVisionBlock

from ilvr_ds import dist
from ilvr_ds.config import load_recipe
from ilvr_ds.data.features import FeatureSet
from ilvr_ds.data.window import Window
from ilvr_ds.engine.networks import init_process_group
from ilvr_ds.errors import UserError
from ilvr_ds.model.vision import VisionTower
from ilvr_ds.monitoring.metric_sums import MetricSums
from ilvr_ds.training.assembly import assemble
from ilvr_ds.training.components import Components
from tests.distributed import workers_run


def with_and_without_tower(recipe: str, overrides: list[str], features: list[str]) -> dict[str, dict[str, Any]]:
    """Loss sums, gradients and evaluation of one step: through the tower, from stored features, and from the rows that
    are stored, put where the tower's output would be."""
    init_process_group()
    results = {}
    with _counted_tower() as built:
        stored = _assemble(recipe, [*overrides, *features])
        results["stored"] = {**_step(stored), "built": built[0]}
        assert stored.step.student.module.model.model.visual is None
        tower = _assemble(recipe, overrides)
        results["tower"] = {**_step(tower), "built": built[0] - results["stored"]["built"]}
    for dataset, rows in ((tower.loader.dataset, stored.loader.dataset), (_held_out(tower), _held_out(stored))):
        dataset.numbers_of = _Noting(dataset.numbers_of)
        tower.step.vision = _Rows(rows.features.features[0], dataset.numbers_of, not tower.recipe.has_targets)
        if rows is stored.loader.dataset:
            results["rows"] = _losses(tower)
        else:
            results["rows"]["eval"] = tower.held_out(lambda: False)
    return results


def built_by_a_run(recipe: str, overrides: list[str]) -> int:
    """How many parts of a vision tower a whole run builds."""
    with _counted_tower() as built:
        workers_run.train(recipe, overrides)
    return built[0]


def refusals(recipe: str, changes: list[list[str]]) -> list[str]:
    """What each run says before it loads anything."""
    init_process_group()
    messages = []
    with _counted_tower() as built:
        for overrides in changes:
            try:
                assemble(load_recipe(recipe, overrides), Path(recipe))
            except UserError as error:
                messages.append(str(error))
            else:
                messages.append("accepted")
    assert built[0] == 0
    return messages


def _assemble(recipe: str, overrides: list[str]) -> Components:
    return assemble(load_recipe(recipe, overrides), Path(recipe))


def _held_out(parts: Components) -> Any:
    assert parts.held_out is not None
    return parts.held_out.dataset


def _step(parts: Components) -> dict[str, Any]:
    results = _losses(parts)
    assert parts.held_out is not None
    return {**results, "eval": parts.held_out(lambda: False)}


def _losses(parts: Components) -> dict[str, Any]:
    """The first step's features, sums over all ranks, and whole gradients; no weight is changed."""
    window = parts.loader.dataset[0].to(dist.device())
    assert not window.bad
    prepared = parts.step.prepare(window)
    total, grads = torch.zeros(()), {}
    student = parts.step.student
    for group in student.optimizer.param_groups:
        group["lr"] = 0.0
    totals = MetricSums(parts.step.sums, dist.device())
    *_, last = prepared.window.micro_batches
    for micro in prepared.window.micro_batches:
        loss = parts.step.loss(micro, prepared, 0, totals)
        student.backward(loss * dist.world_size(), scale_wrt_gas=False)
        total += loss.detach()
        if micro is last:  # only then DeepSpeed has the gradient of the whole step
            parameters = student.module.model.named_parameters()
            grads = {name: safe_get_full_grad(p).clone() for name, p in parameters if p.requires_grad}
        student.step()
    return {"loss": float(dist.sum_over_ranks(total)), "sums": totals.take(), "grads": grads}


class _Noting:
    """Remembers the sample numbers that a dataset asked for last."""

    def __init__(self, numbers_of: Any) -> None:
        self.numbers_of = numbers_of
        self.last: Any = None

    def __call__(self, step: int) -> Any:
        self.last = self.numbers_of(step)
        return self.last


class _Rows:
    """Stands for a tower whose output is rounded to bf16: the stored rows in the tower's order."""

    def __init__(self, stored: FeatureSet, numbers: _Noting, inputs_only: bool) -> None:
        self.stored, self.numbers, self.inputs_only = stored, numbers, inputs_only

    def of_sample(self, number: int) -> tuple[Any, Any]:
        entry = self.stored.index[number]
        rows = self.stored.read(number, int(entry["inputs"]), int(entry["helpers"]))
        split = int(entry["inputs"])
        return rows[:split], rows[split : split if self.inputs_only else None]

    def features(self, window: Window) -> Tensor:
        order = []
        for micro in self.numbers.last:
            samples = [self.of_sample(int(n)) for n in micro]
            order += [inputs for inputs, _ in samples] + [helpers for _, helpers in samples]
        rows = np.concatenate(order).view(np.int16)
        return torch.from_numpy(rows).view(torch.bfloat16).float()


@contextmanager
def _counted_tower() -> Iterator[list[int]]:
    """Counts the vision blocks and towers that are built inside the block."""
    count = [0]
    true = {cls: cls.__init__ for cls in (VisionTower, Qwen2_5_VLVisionBlock)}

    def counting(cls: type) -> Any:
        def init(self: Any, *arguments: Any, **options: Any) -> None:
            count[0] += 1
            true[cls](self, *arguments, **options)

        return init

    for cls in true:
        cls.__init__ = counting(cls)
    try:
        yield count
    finally:
        for cls, init in true.items():
            cls.__init__ = init
