"""What fits on a card: the settings that a plan knows, tried one with another, the fastest first.

Searched are what is trained and by which optimizer, activation checkpointing, the tokens of a micro-batch, where the
teacher stays, and the file of ZeRO settings. A step keeps its samples, and what `--set` names stays as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from itertools import product
from typing import Any

from ilvr_ds.config import Recipe, recipe_from_dict
from ilvr_ds.errors import UserError
from ilvr_ds.model.sizes import Geometry
from ilvr_ds.planning.bound import bound_time
from ilvr_ds.planning.chips import CHIPS, Chip
from ilvr_ds.planning.memory import GIB, Memory, predict_memory
from ilvr_ds.planning.setup import SampleSize, Setup, Zero

MARGIN = 0.03
"""Fraction of a GPU's memory below which a fit is tight: peaks were predicted within 2.4 %, the rest is assumed."""
RANK = 64
"""Of adapters, where the recipe has none."""
TOKENS = (2048, 3072, 4096, 6144, 8192, 12288, 16384)
"""Of a micro-batch; only those that hold the longest sample that the recipe allows."""
TEACHER_TOKENS = (65536, 16384)
"""That the teacher reads at once."""
STAND_IN = CHIPS["H100"]
"""Orders what fits on a chip whose rates are unknown."""

Changes = dict[str, Any]
"""Values by dotted key"""
ReadZero = Callable[[str], Zero]
"""The settings of a DeepSpeed file, by its name"""


@dataclass(frozen=True)
class Room:
    """What a rank has."""

    gpu_gib: float
    host_gib: float | None
    """None: not said, and not looked at"""
    chip: Chip | None
    world: int

    def holds(self, memory: Memory) -> bool:
        """Whether a run fits with a margin."""
        host = self.host_gib is None or sum(memory.host.values()) <= self.host_gib * GIB
        return host and memory.needed <= (1 - MARGIN) * self.gpu_gib * GIB


@dataclass(frozen=True)
class Candidate:
    """One combination of settings."""

    changes: Changes
    """What differs from the recipe"""
    setup: Setup
    memory: Memory
    seconds: float
    """Least time of a sample and rank; on STAND_IN where the chip is unknown"""

    @property
    def kind(self) -> str:
        """What is trained, and by which optimizer, in words."""
        setup = self.setup
        if setup.lora_rank:
            return f"adapters of rank {setup.lora_rank}" + " on a base in 4 bits" * setup.has_4_bit_base
        optimizers = {"adamw": "", "adamw_8bit": ", AdamW in 8 bits", "cpu_adam": ", AdamW on the host"}
        return "all weights" + optimizers.get(setup.optimizer, f", {setup.optimizer}")

    @property
    def words(self) -> str:
        """The rest in words."""
        setup = self.setup
        batch = f"{setup.micro_batch_tokens} tokens" if setup.micro_batch_tokens else f"{setup.micro_batch_size} a row"
        checkpointing = {"none": "no", "full": "full", "selective": "selective"}[setup.checkpointing]
        teacher = {"cpu": ", teacher on the host", "none": ", teacher on the GPU"}[setup.teacher_offload]
        teacher += f" in {setup.teacher_pieces} pieces" if setup.teacher_pieces > 1 else ""
        parts = f"{checkpointing} checkpointing, {batch}, ZeRO-{setup.zero.stage}"
        return f"{self.kind}: {parts}{teacher if setup.has_teacher else ''}"


def search(
    recipe: Recipe, fixed: set[str], geometry: Geometry, sample: SampleSize, read_zero: ReadZero, room: Room
) -> list[Candidate]:
    """All combinations, the fastest first. fixed: dotted keys that stay. Raises UserError where each is refused."""
    found: list[Candidate] = []
    refusal: UserError | None = None
    seen: set[tuple[Any, ...]] = set()
    before = recipe.flat()
    for options in _combinations(recipe, room.world, fixed):
        changes = {key: value for key, value in options.items() if key not in fixed and before[key] != value}
        if (identity := tuple(sorted(changes.items()))) in seen:
            continue
        seen.add(identity)
        try:
            changed = changed_recipe(recipe, changes)
        except UserError as error:
            refusal = error
            continue
        setup = Setup.of(changed, read_zero(changed.deepspeed.config), geometry, room.world, sample)
        if setup.zero.offloads_optimizer != (setup.optimizer == "cpu_adam"):
            continue
        bound = bound_time(setup, room.chip or STAND_IN)
        seconds = room.world * bound.seconds / bound.samples
        found.append(Candidate(changes, setup, predict_memory(setup), seconds))
    if not found and refusal is not None:
        raise refusal
    return sorted(found, key=lambda candidate: candidate.seconds)


def best_of_each_kind(found: list[Candidate], room: Room) -> list[Candidate]:
    """Of those that fit, the fastest of each kind, the fastest first."""
    kinds: dict[str, Candidate] = {}
    for candidate in found:
        if room.holds(candidate.memory):
            kinds.setdefault(candidate.kind, candidate)
    return list(kinds.values())


def changed_recipe(recipe: Recipe, changes: Mapping[str, Any]) -> Recipe:
    """The recipe with other values. Raises UserError where they do not go together."""
    sections = recipe.to_dict()
    for key, value in changes.items():
        section, _, name = key.partition(".")
        sections[section][name] = value
    return recipe_from_dict(sections)


def for_ranks(recipe: Recipe, world: int, fixed: Collection[str] = ()) -> Changes:
    """What must change for the recipe's order of samples to suit `world` ranks: a step has as many samples as lanes
    where that can be, else there are other lanes. Raises UserError where keys that stay, `fixed`, do not allow it."""
    train, lanes = recipe.train, recipe.data.lanes
    step = train.micro_batch_size * train.grad_accum_steps * world
    if lanes % world == 0 and step % lanes == 0:
        return {}
    if lanes % (train.micro_batch_size * world) == 0 and "train.grad_accum_steps" not in fixed:
        return {"train.grad_accum_steps": lanes // (train.micro_batch_size * world)}
    if "data.lanes" in fixed:
        raise UserError(
            f"plan: --set data.lanes={lanes}: {world} x train.micro_batch_size {train.micro_batch_size} x "
            f"train.grad_accum_steps {train.grad_accum_steps} = {step} samples a step, not a multiple of lanes and "
            f"ranks; try data.lanes={step}"
        )
    return {"data.lanes": step}


def _combinations(recipe: Recipe, world: int, fixed: Collection[str]) -> Iterator[Changes]:
    """Values of the keys that are searched."""
    teachers: list[Changes] = [{}]
    if recipe.has_teacher:
        counts = sorted({recipe.teacher.max_tokens, *TEACHER_TOKENS}, reverse=True)
        teachers = [
            {"teacher.offload": place, "teacher.max_tokens": count} for place in ("none", "cpu") for count in counts
        ]
    checkpointing = [{"model.activation_checkpointing": kind} for kind in ("none", "selective", "full")]
    batches = list(_batches(recipe, fixed))
    for trained, kept, batch, teacher in product(_trained(recipe), checkpointing, batches, teachers):
        for name in _zero_files(recipe, world, trained["optim.name"]):
            yield {**trained, **kept, **batch, **teacher, "deepspeed.config": name}


def _trained(recipe: Recipe) -> Iterator[Changes]:
    """What is trained, and by which optimizer."""
    for optimizer in ("adamw", "adamw_8bit", "cpu_adam"):
        yield {"model.lora_rank": 0, "model.lora_base": "full", "optim.name": optimizer}
    for base in ("full", "nf4"):
        yield {"model.lora_rank": recipe.model.lora_rank or RANK, "model.lora_base": base, "optim.name": "adamw"}


def _batches(recipe: Recipe, fixed: Collection[str]) -> Iterator[Changes]:
    """Micro-batches of other sizes, in steps of equally many samples: if one of size and number stays, so does the
    other."""
    train, longest = recipe.train, recipe.data.max_tokens
    if recipe.packs:
        for tokens in sorted({longest, *(count for count in TOKENS if count > longest)}):
            yield {"train.micro_batch_tokens": tokens}
        return
    if {"train.micro_batch_size", "train.grad_accum_steps"} & set(fixed):
        yield {}
        return
    samples = train.micro_batch_size * train.grad_accum_steps
    for size in (count for count in range(1, samples + 1) if samples % count == 0):
        yield {"train.micro_batch_size": size, "train.grad_accum_steps": samples // size}


def _zero_files(recipe: Recipe, world: int, optimizer: str) -> tuple[str, ...]:
    if optimizer == "cpu_adam":
        return ("zero3_offload_optimizer",)
    if world == 1:
        return ("zero1", "zero3_single_gpu")
    kept = ("zero3_kept_weights",) if recipe.train.has_free_latents else ()
    return ("zero1", "zero2", "zero3", *kept)
