"""The lines of `ilvr-ds plan`: a recipe's memory and time, which recipes fit, and which choices would."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

from ilvr_ds.planning.bound import bound_time
from ilvr_ds.planning.chips import Chip
from ilvr_ds.planning.memory import GIB, Memory, predict_memory
from ilvr_ds.planning.search import MARGIN, Candidate
from ilvr_ds.planning.setup import Setup

H100_GIB, H200_GIB = 75, 100
"""If no chip is named, a GPU of this much memory or more counts as an H100, or as an H200."""
UNKNOWN = "unknown: time not given"


def default_chip(gpu_memory: float) -> str | None:
    """The chip to assume for a GPU of this many GiB; None: it may be anything."""
    if gpu_memory < H100_GIB:
        return None
    return "H100" if gpu_memory <= H200_GIB else "H200"


def detail(title: str, setup: Setup, gpu_memory: float | None, chip: Chip | None) -> list[str]:
    """One recipe, term by term, and the effect of other choices. gpu_memory: usable GiB; None: there is no GPU."""
    memory = predict_memory(setup)
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
    lines += ["", *_time(setup, chip)]
    if gpu_memory is None:
        return lines
    lines += ["", verdict(memory, gpu_memory), "", "other choices", *overview(dict(_choices(setup)), gpu_memory, chip)]
    return lines


def _time(setup: Setup, chip: Chip | None) -> list[str]:
    """The least time of a step, part by part."""
    samples = setup.window_samples * setup.world
    if chip is None:
        return [f"a step of {samples} samples: the rates of the chip are {UNKNOWN}"]
    bound = bound_time(setup, chip)
    lines = [f"a step of {bound.samples} samples takes at least (ms)"]
    lines += [f"  {1000 * seconds:8.0f}  {part}" for part, seconds in bound.parts.items()]
    lines += [
        f"  {1000 * bound.seconds:8.0f}  in all: {setup.world * 1000 * bound.seconds / bound.samples:.0f} ms a sample "
        f"and rank, MFU at most {bound.mfu(chip):.0%}"
    ]
    return lines


def what_fits(best: Sequence[Candidate], gpu_memory: float, chip: Chip | None, command: str) -> list[str]:
    """The best of each kind, numbered, and the first as a command."""
    order = "the fastest first" if chip else "in the order of an H100, for the rates of the chip are " + UNKNOWN
    rows = {f"{number}  {candidate.words}": candidate.setup for number, candidate in enumerate(best, 1)}
    lines = [f"what fits with a margin of {MARGIN:.0%}, {order}", *overview(rows, gpu_memory, chip)]
    return [*lines, "number 1:", f"  {command}"]


def least_needed(found: Sequence[Candidate], host_gib: float | None) -> str:
    """What to say where nothing fits."""
    least = min(found, key=lambda candidate: candidate.memory.needed)
    host = sum(least.memory.host.values()) / GIB
    short = f", and {host:.0f} GiB of the host's" if host_gib is not None and host > host_gib else ""
    gpu = f"{least.memory.needed / GIB / (1 - MARGIN):.1f} GiB a GPU"
    return f"nothing fits with a margin of {MARGIN:.0%}: the least, {least.words}, takes {gpu}{short}"


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


def overview(setups: Mapping[str, Setup], gpu_memory: float, chip: Chip | None) -> list[str]:
    """One line each, in aligned columns: name, GPU memory, host memory, least time per sample, verdict."""
    width = max(map(len, setups))
    lines = [f"{'':<{width}}  GPU needs  host a rank  ms a sample"]
    for name, setup in setups.items():
        memory = predict_memory(setup)
        bound = bound_time(setup, chip) if chip else None
        time = f"{setup.world * 1000 * bound.seconds / bound.samples:.0f}" if bound else "unknown"
        fits = verdict(memory, gpu_memory).partition(",")[0]
        sizes = f"{memory.needed / GIB:>5.1f} GiB  {sum(memory.host.values()) / GIB:>7.1f} GiB"
        lines.append(f"{name:<{width}}  {sizes}  {time:>11}  {fits}")
    return lines


def _choices(setup: Setup) -> Iterator[tuple[str, Setup]]:
    """The same run with one choice changed, and with some combined."""
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
    if setup.may_do_without_teacher:
        yield "selection.unchanged=none", replace(setup, has_teacher=False, may_do_without_teacher=False)
    if setup.has_tower:
        yield "features stored (data.features)", replace(setup, has_tower=False)
