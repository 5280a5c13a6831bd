"""One row's products by the kernel, by tile, beside PyTorch's: bytes of weights a second, at the shapes of a model.

    python -m tests.bench.matvec                    # needs a GPU
    python -m tests.bench.matvec --compile 0        # only compile for a shape, by number, several beside each other

Each product is recorded in a graph over as many weights of its own as fill 2 GiB, so that no cache holds them.
"""

from __future__ import annotations

import argparse
import itertools
import logging
import time
from collections.abc import Callable
from typing import Any

import torch

from ilvr_ds.generation.kernels import use_kernels
from ilvr_ds.generation.matvec import Tile, add_product, gated, launch, product

SHAPES = {"queries, keys, values": (4608, 3584), "output": (3584, 3584), "gate and up": (18944, 3584),
          "down": (3584, 18944), "head": (152064, 3584)}  # fmt: skip
TILES = [  # eight neighbouring columns for a thread, or a multiple, so that inputs need not change hands
    Tile(rows, warps * 256 * times, warps, ahead)
    for rows, warps, times, ahead in itertools.product((1, 2, 4, 8), (1, 2, 4, 8), (1, 2, 4), (1, 3))
    if 2 <= rows * times <= 8 and warps * times * 256 <= 4096
]
BYTES = 2 << 30
SECONDS = 9
"""For the tiles of a shape"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--compile", type=int, default=None)
    only = parser.parse_args().compile
    if not torch.cuda.is_available():
        parser.error("no GPU is visible, and Triton's kernels run on nothing else")
    device = torch.device("cuda")
    if only is not None:
        name = list(SHAPES)[only]
        with torch.inference_mode():
            _shape(name, *SHAPES[name], device, only_compile=True)
        return
    print(torch.cuda.get_device_name(), flush=True)
    torch.manual_seed(0)
    with torch.inference_mode():
        for name, (N, K) in SHAPES.items():
            _shape(name, N, K, device)


def _shape(name: str, N: int, K: int, device: torch.device, only_compile: bool = False) -> None:
    is_gated = name == "gate and up"
    count = 2 if only_compile else max(2, BYTES // (N * K * 2))
    weights = [torch.randn(N, K, device=device, dtype=torch.bfloat16) / K**0.5 for _ in range(count)]
    x = torch.randn(1, K, device=device, dtype=torch.bfloat16)
    norm: Any = None
    if name not in ("output", "down", "head"):
        norm = torch.nn.RMSNorm(K, 1e-6).to(device, torch.bfloat16)
        norm.variance_epsilon = 1e-6
        norm.weight.uniform_(0.5, 1.5)
    bias = torch.randn(N, device=device).bfloat16() if N == 4608 else None
    residual = torch.randn(1, N, device=device).bfloat16() if name in ("output", "down") else None
    pairs = list(zip(weights[::2], weights[1::2], strict=False)) if is_gated else [(w, None) for w in weights]
    size = N * K * 2 * (2 if is_gated else 1)

    def stock() -> torch.Tensor:
        for weight, other in pairs:
            if other is not None:
                made = gated(x, weight, other, norm)
            elif residual is not None:
                made = add_product(residual.clone(), x, weight)
            else:
                made = product(x, weight, bias, norm)
        return made

    def by(tile: Tile) -> Callable[[], torch.Tensor]:
        def run() -> torch.Tensor:
            output = x.new_empty(1, N)
            for weight, other in pairs:
                launch(x, weight, other, bias if residual is None else residual, output, norm, tile)
            return output

        return run

    tiles = [tile for tile in TILES if -(-K // tile.columns) * tile.columns <= 1.2 * K]
    if only_compile:
        for tile in tiles:
            by(tile)()
        torch.cuda.synchronize()
        print(f"{name}: {len(tiles)} tiles compiled", flush=True)
        return
    use_kernels(False)
    expected = stock().float()
    plain = _seconds(stock) / len(pairs)
    use_kernels(True)
    exact = _exact(x, pairs[-1], bias, residual, norm)
    print(f"{name} [{N}, {K}]: PyTorch {plain * 1e6:.1f} us, {size / plain / 1e12:.2f} TB/s, "
          f"off by {float((expected - exact).abs().max()):.1e}", flush=True)  # fmt: skip
    found: list[tuple[float, Tile, float]] = []
    started = time.perf_counter()
    for tile in tiles:
        if time.perf_counter() - started > SECONDS:
            break
        try:
            off = float((by(tile)().float() - exact).abs().max())
            found.append((_seconds(by(tile)) / len(pairs), tile, off))
        except Exception:
            logging.exception("%s failed", tile)
    for seconds, tile, off in sorted(found)[:6]:
        print(f"  {seconds * 1e6:.1f} us, {size / seconds / 1e12:.2f} TB/s, off by {off:.1e}: {tile}", flush=True)
    if found:
        print(f"  of {len(found)} tiles; slowest {max(found)[0] * 1e6:.1f} us", flush=True)


def _exact(
    x: torch.Tensor, pair: tuple[torch.Tensor, torch.Tensor | None], bias: torch.Tensor | None,
    residual: torch.Tensor | None, norm: Any,
) -> torch.Tensor:  # fmt: skip
    """In float32."""
    inputs = x.float()
    if norm:
        inputs = torch.nn.functional.rms_norm(inputs, (len(norm.weight),), norm.weight.float(), norm.variance_epsilon)
    one = inputs @ pair[0].float().T
    if pair[1] is not None:
        return torch.nn.functional.silu(one) * (inputs @ pair[1].float().T)
    return one + sum(part.float() for part in (bias, residual) if part is not None)


def _seconds(run: Callable[[], torch.Tensor]) -> float:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        run()
    graph.replay()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(5):
        graph.replay()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / 5e3


if __name__ == "__main__":
    main()
