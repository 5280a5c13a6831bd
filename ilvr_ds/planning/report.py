"""The lines of `ilvr-ds plan`: a recipe's memory and time, which recipes fit, and which choices would."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace

from ilvr_ds.planning.bound import bound_time
from ilvr_ds.planning.chips import CHIPS, Chip
from ilvr_ds.planning.memory import GIB, Memory, predict_memory
from ilvr_ds.planning.setup import Setup

SMALL_GIB = 100
"""If no chip is named, a GPU of up to this much memory counts as an H100, above as an H200."""
MARGIN = 0.03
"""Fraction of a GPU's memory below which a fit is tight: peaks were predicted within 2.4 %, the rest is assumed."""


def default_chip(gpu_memory: float) -> str:
    """The chip to assume for a GPU of this many GiB."""
    return "H100" if gpu_memory <= SMALL_GIB else "H200"


def detail(title: str, setup: Setup, gpu_memory: float, chip_name: str) -> list[str]:
    """One recipe, term by term, and the effect of other choices. gpu_memory: usable GiB."""
    memory, chip = predict_memory(setup), CHIPS[chip_name]
    bound = bound_time(setup, chip)
    lines = [f"{title}, a rank:"]
    lines += ["", "GPU memory, all the time (GiB)", *_terms(memory.resident)]
    lines += ["on top of it, one after the other (GiB)", *_terms(memory.moments)]
    lines += [f"  {memory.peak / GIB:8.1f}  at the peak; {memory.needed / GIB:.1f} with CUDA, NCCL and gaps"]
    lines += ["host memory (GiB)", *_terms(memory.host)]
    host = sum(memory.host.values())
    lines += [
        f"  {host / GIB:8.1f}  a rank, {setup.world * host / GIB:.0f} for all {setup.world}; "
        f"{memory.checkpoint_copy / GIB:.1f} more while a checkpoint is written beside the training"
    ]
    lines += ["", f"a step of {bound.samples} samples takes at least (ms)"]
    lines += [f"  {1000 * seconds:8.0f}  {part}" for part, seconds in bound.parts.items()]
    lines += [
        f"  {1000 * bound.seconds:8.0f}  in all: {setup.world * 1000 * bound.seconds / bound.samples:.0f} ms a sample "
        f"and rank, MFU at most {bound.mfu(chip):.0%}"
    ]
    lines += ["", verdict(memory, gpu_memory), "", "other choices", *_table(_variants(setup), gpu_memory, chip)]
    return lines


def overview(setups: Mapping[str, Setup], gpu_memory: float, chip_name: str) -> list[str]:
    """One line per recipe."""
    return _table(setups, gpu_memory, CHIPS[chip_name])


def verdict(memory: Memory, gpu_memory: float) -> str:
    """Whether it fits, and by how much."""
    room = gpu_memory - memory.needed / GIB
    if room < 0:
        return f"does not fit: {-room:.1f} GiB too much"
    margin = MARGIN * gpu_memory
    if room < margin:
        return f"tight: {room:.1f} GiB to spare, and a plan may be {margin:.1f} off ({MARGIN:.0%})"
    return f"fits: {room:.1f} GiB to spare"


def _terms(terms: Mapping[str, float]) -> list[str]:
    return [f"  {size / GIB:8.1f}  {name}" for name, size in terms.items()]


def _table(setups: Mapping[str, Setup], gpu_memory: float, chip: Chip) -> list[str]:
    """Aligned columns: name, GPU memory, host memory, least time per sample, verdict."""
    width = max(map(len, setups))
    lines = [f"{'':<{width}}  GPU needs  host a rank  ms a sample"]
    for name, setup in setups.items():
        memory, bound = predict_memory(setup), bound_time(setup, chip)
        fits = verdict(memory, gpu_memory).partition(",")[0]
        sizes = f"{memory.needed / GIB:>5.1f} GiB  {sum(memory.host.values()) / GIB:>7.1f} GiB"
        lines.append(f"{name:<{width}}  {sizes}  {setup.world * 1000 * bound.seconds / bound.samples:>11.0f}  {fits}")
    return lines


def _variants(setup: Setup) -> dict[str, Setup]:
    """The same run with one choice changed, and with some combined."""
    return dict(_choices(setup))


def _choices(setup: Setup) -> Iterator[tuple[str, Setup]]:
    yield "as it is", setup
    for kind in ("none", "selective", "full"):
        if kind != setup.checkpointing and (kind != "selective" or not setup.has_whole_chain):
            yield f"model.activation_checkpointing={kind}", replace(setup, checkpointing=kind)
    if setup.micro_batch_tokens and setup.micro_batch_size > 1:
        tokens = setup.micro_batch_tokens // 2
        yield f"train.micro_batch_tokens={tokens}", setup.filled(tokens)
    elif setup.micro_batch_size > 1:
        accum = setup.window_samples
        yield (
            f"train.micro_batch_size=1, train.grad_accum_steps={accum}",
            replace(setup, micro_batch_size=1, grad_accum_steps=accum),
        )
    if setup.optimizer == "adamw":
        yield "optim.name=adamw_8bit", replace(setup, optimizer="adamw_8bit")
    offloaded = replace(setup, optimizer="cpu_adam", zero=replace(setup.zero, offloads_optimizer=True))
    if not setup.zero.offloads_optimizer:
        yield "optim.name=cpu_adam, optimizer offload", offloaded
        if setup.checkpointing != "full":
            yield "that, and full checkpointing", replace(offloaded, checkpointing="full")
    for stage in range(1, setup.zero.stage):
        yield f"ZeRO-{stage}", replace(setup, zero=replace(setup.zero, stage=stage))
    adapted = replace(setup, lora_rank=setup.lora_rank or 64)
    if not setup.lora_rank:
        yield "model.lora_rank=64", adapted
    if not setup.has_4_bit_base:
        name = "model.lora_base=nf4" if setup.lora_rank else "model.lora_rank=64, model.lora_base=nf4"
        yield name, replace(adapted, has_4_bit_base=True)
    if setup.has_teacher:
        other = "none" if setup.teacher_offload == "cpu" else "cpu"
        yield f"teacher.offload={other}", replace(setup, teacher_offload=other)
    if setup.has_tower:
        yield "features stored (data.features)", replace(setup, has_tower=False)
