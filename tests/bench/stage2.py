"""Stage 2 with gradients through the chain and with detached latents, and what recomputing the whole prefix for each
latent slot takes: time and memory of one micro-batch.

    python -m tests.bench.stage2 --geometry 3b                 # on a GPU: bf16, micro-batch 1, 4 and 16
    python -m tests.bench.stage2 --geometry tiny --tokens 300  # anywhere; only ratios mean something, and little

The work is forward and backward of the language model with random weights on 1,000 tokens with 3 segments of 8 slots,
at other places in every row. The head and the loss, the same in both ways, are left out, and so are ZeRO, optimizer
and vision. Recomputing does as little as it can: the prefix up to the slot, not the whole sequence. All ways are run
with and without activation checkpointing.
"""

from __future__ import annotations

import argparse
import gc
import time
from collections.abc import Callable, Iterator
from functools import partial
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLTextConfig
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLTextModel

from ilvr_ds.data.rollout import lay_out
from ilvr_ds.data.template import EncodedSample
from ilvr_ds.data.window import TokenBatch
from ilvr_ds.model.injection import last_hidden, write_latents
from ilvr_ds.model.latent_pass import LatentPasses
from ilvr_ds.model.layers.cached_attention import cached_attention, use_cached_attention
from ilvr_ds.model.layers.fused import kernels_in_words, use_fused_kernels
from ilvr_ds.model.rollout import own_latents, roll_out
from tests.bench.geometry import ROPE, TEXT, TINY
from tests.model.recompute import recompute

SEGMENTS, SLOTS = 3, 8


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--geometry", choices=[*TEXT, "tiny"], default="3b")
    parser.add_argument("--layers", type=int, default=0, help="fewer layers than the model has, to save memory")
    parser.add_argument("--tokens", type=int, default=1000)
    parser.add_argument("--micro-batches", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--kernels", default="auto", choices=["auto", "liger", "stock"])
    parser.add_argument("--cuda-graphs", default="auto", choices=["auto", "none"], help="of latent slots")
    parser.add_argument("--no-recompute", action="store_true", help="leave the slowest way out")
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    name = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    model = build(options.geometry, options.layers, device)
    use_fused_kernels(model, options.kernels, device, model.dtype)
    print(f"{name}, torch {torch.__version__}, {options.geometry}, {len(model.layers)} layers, {model.dtype}")
    is_recorded = device.type == "cuda" and options.cuda_graphs == "auto"
    print(f"layers: {kernels_in_words(model)}; latents: {'recorded' if is_recorded else 'called'}")
    print(f"{options.tokens} tokens, {SEGMENTS} segments of {SLOTS} slots; seconds of forward and backward, peak GiB")
    print(f"{'micro-batch':>11}  {'checkpointing':>13}  {'detached':>16}  {'whole chain':>16}  {'recompute':>16}")
    for size in options.micro_batches:
        for checkpointing in (False, True):
            forwards = islice(ways(model, size, options.tokens, checkpointing, is_recorded), 3 - options.no_recompute)
            shown = "  ".join(f"{show(*measure(way, options.repeats, device)):>16}" for way in forwards)
            print(f"{size:>11}  {'yes' if checkpointing else 'no':>13}  {shown}", flush=True)


def build(geometry: str, layers: int, device: torch.device) -> Any:
    """A language model with random weights, bf16 on a GPU."""
    sizes = {**TEXT, "tiny": TINY}[geometry]
    sizes = {**sizes, "num_hidden_layers": layers or sizes["num_hidden_layers"]}
    config = Qwen2_5_VLTextConfig(**sizes, rope_parameters=dict(ROPE), use_cache=False)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    with device:
        model: Any = Qwen2_5_VLTextModel._from_config(config, attn_implementation="sdpa", dtype=dtype)
    return model.train()


def ways(model: Any, size: int, length: int, checkpointing: bool, is_recorded: bool) -> Iterator[Callable[[], Tensor]]:
    """The forwards with detached latents, of the rollout, and of recomputing; each sets the model up for itself."""
    device, dtype = model.device, model.dtype
    draw = np.random.default_rng(0)
    samples = [sample(draw, length) for _ in range(size)]
    base = [length * row for row in range(size)]
    layout = lay_out(samples, base, (size, length), SLOTS, image_pad=-1).to(device)
    tokens = batch(samples).to(device)
    rows = torch.arange(size).repeat_interleave(SEGMENTS)
    first = torch.tensor([[start + int(at)] for s, start in zip(samples, base, strict=True) for at in s.segments])
    slots = first + torch.arange(SLOTS)

    def embeddings() -> Tensor:
        generator = torch.Generator(device).manual_seed(0)
        shape = (size, length, model.config.hidden_size)
        return torch.randn(shape, generator=generator, device=device, dtype=dtype).mul(0.02).requires_grad_()

    def use_stock_attention() -> None:
        model.config._attn_implementation = "sdpa"
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        else:
            model.gradient_checkpointing_disable()

    def passes(has_backward: bool) -> LatentPasses | None:
        return LatentPasses(model, has_backward=has_backward) if is_recorded else None

    def detached(passes: LatentPasses | None) -> Tensor:
        use_stock_attention()
        texts = embeddings()
        with cached_attention(model):
            latents = own_latents(model, texts, tokens, layout, SLOTS, passes)
        is_set = torch.ones_like(layout.slots, dtype=torch.bool)
        return last_hidden(model, tokens, write_latents(texts, layout.slots, latents, is_set))

    def rollout(passes: LatentPasses | None) -> Tensor:
        model.gradient_checkpointing_disable()
        use_cached_attention(model)
        return roll_out(model, embeddings(), tokens, layout, SLOTS, checkpointing, passes)

    def plain() -> Tensor:
        use_stock_attention()
        return recompute(model, embeddings(), tokens, slots, rows)

    yield partial(detached, passes(has_backward=False))  # a generator: the memory of one goes before the next comes
    yield partial(rollout, passes(has_backward=True))
    yield plain


def sample(draw: np.random.Generator, length: int) -> EncodedSample:
    """A question of about two thirds, then texts of random lengths with segments between; no image."""
    nothing = np.empty(0, dtype=np.int64)
    free = length - length * 2 // 3 - SEGMENTS * SLOTS
    cuts = np.sort(draw.choice(np.arange(2, free - 1), SEGMENTS, replace=False))
    segments = length * 2 // 3 + cuts + SLOTS * np.arange(SEGMENTS)
    ids, positions = np.arange(length), np.tile(np.arange(length), (3, 1))
    return EncodedSample("", "", ids, nothing, positions, 0, segments, (0, 0), (), (), 0)


def batch(samples: list[EncodedSample]) -> TokenBatch:
    ids = torch.from_numpy(np.stack([s.input_ids for s in samples]))
    positions = torch.from_numpy(np.stack([s.position_ids for s in samples], axis=1))
    nothing = torch.empty(0, dtype=torch.int64)
    return TokenBatch(ids, positions, torch.ones_like(ids, dtype=torch.bool), nothing, nothing)


def measure(way: Callable[[], Tensor], repeats: int, device: torch.device) -> tuple[float, float]:
    """Median seconds of forward and backward, and the peak in GiB; (0, 0) where memory does not suffice."""
    seconds = []
    if device.type == "cuda":
        gc.collect()  # what one that ran out of memory has left in cycles
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    try:
        for _ in range(repeats + 1):
            start = now(device)
            way().float().square().sum().backward()
            seconds.append(now(device) - start)
    except torch.OutOfMemoryError:
        return 0.0, 0.0
    peak = torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else 0.0
    return float(np.median(seconds[1:])), peak


def now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def show(seconds: float, peak: float) -> str:
    if not seconds:
        return "out of memory"
    return f"{seconds:.2f} s {peak:.1f}" if peak else f"{seconds:.2f} s"


if __name__ == "__main__":
    main()
