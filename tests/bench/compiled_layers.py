"""Whether torch.compile of the decoder layers helps: forward and backward of a language model on one packed row.

    python -m tests.bench.compiled_layers --geometry 7b --layers 14     # on a GPU, bf16

Random weights, outside any engine (DeepSpeed's hooks in ZeRO-3 would break a compiled layer's graph at each module).
Prints seconds for the stock layers and for those with fused kernels, each as they are and compiled, medians and the
time until the first backward is done, which with compile is mostly compiling.
"""

from __future__ import annotations

import argparse
import copy
from typing import Any

import numpy as np
import torch

from ilvr_ds.data.window import TokenBatch
from ilvr_ds.model.injection import last_hidden
from ilvr_ds.model.layers.attention import use_packed_attention
from ilvr_ds.model.layers.fused import use_fused_kernels
from tests.bench.stage2 import build, now

SAMPLE = 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--geometry", choices=["3b", "7b", "tiny"], default="7b")
    parser.add_argument("--layers", type=int, default=14, help="fewer than the model has, to save memory (default 14)")
    parser.add_argument("--tokens", type=int, default=8192, help=f"of the row, a multiple of {SAMPLE} (default 8192)")
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    stock = build(options.geometry, options.layers, device)
    use_packed_attention(stock, "auto", device, stock.dtype)
    fused = copy.deepcopy(stock)
    use_fused_kernels(fused, "auto", device, stock.dtype)
    name = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    sizes = f"{options.geometry}, {options.layers} layers, {stock.dtype}, {options.tokens} tokens"
    print(f"{name}, torch {torch.__version__}, {sizes}")
    print(f"{'layers':>8}  {'compiled':>8}  {'ms':>24}  {'first, s':>8}")
    for kind, model in (("stock", stock), ("fused", fused)):
        for is_compiled in (False, True):
            if is_compiled:
                for layer in model.layers:
                    layer.compile()
            seconds = [_measure(model, options.tokens) for _ in range(options.repeats + 1)]
            times = 1e3 * np.array(seconds[1:])
            shown = f"{np.median(times):.1f} ({times.min():.1f} to {times.max():.1f})"
            print(f"{kind:>8}  {'yes' if is_compiled else 'no':>8}  {shown:>24}  {seconds[0]:>8.1f}", flush=True)


def _measure(model: Any, tokens: int) -> float:
    """Seconds of a forward and a backward."""
    device = model.device
    row = torch.arange(tokens, device=device)[None]
    none = torch.empty(0, dtype=torch.int64, device=device)
    bounds = torch.arange(0, tokens + 1, SAMPLE, dtype=torch.int32, device=device)
    batch = TokenBatch(
        row, (row % SAMPLE).expand(3, 1, -1), torch.ones_like(row, dtype=torch.bool), none, none,
        cu_seqlens=bounds, lengths=(SAMPLE,) * (tokens // SAMPLE),
    )  # fmt: skip
    embeddings = torch.randn(1, tokens, model.config.hidden_size, device=device, dtype=model.dtype).requires_grad_()
    model.zero_grad()
    start = now(device)
    last_hidden(model, batch, embeddings).float().square().mean().backward()
    return now(device) - start


if __name__ == "__main__":
    main()
