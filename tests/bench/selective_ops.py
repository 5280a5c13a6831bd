"""Time, bandwidth and memory of the selective-feature operators against the reference, eager and compiled.

    python -m tests.bench.selective_ops                  # on a GPU: the sizes of the table in csrc/README.md

On a CPU (`--device cpu`) "ours" is the reference too: that shows only that this program works.

Times are medians with a cold L2 cache. Bytes are the fewest that any version must move: candidates and predictions
once a pass. Bandwidth is these over the time, and stands beside that of a device copy (bytes read and written).
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ilvr_ds.ops import reference
from ilvr_ds.ops.build import load
from ilvr_ds.ops.selective_contrastive import selective_contrastive_loss
from ilvr_ds.ops.selective_topk import selective_topk

K, P = 8, 256  # slots and candidates of a segment
SIZES = [(24, 768), (192, 6144), (64, 393216), (192, 393216)]


@dataclass
class Timer:
    """Median milliseconds of a call."""

    device: str
    seconds: float
    cache: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.cache = torch.empty(2**28 if self.device == "cuda" else 0, dtype=torch.int8, device=self.device)

    def __call__(self, call: Callable[[], Any]) -> float:
        call()
        once = self._once(call)
        return statistics.median(self._once(call) for _ in range(max(5, min(200, int(1000 * self.seconds / once)))))

    def _once(self, call: Callable[[], Any]) -> float:
        if self.device == "cpu":
            start = time.perf_counter()
            call()
            return 1000 * (time.perf_counter() - start)
        self.cache.zero_()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end)


def loss_arguments(S: int, N: int, D: int, device: str, dtype: torch.dtype, negatives: str) -> dict[str, Any]:
    """S / K segments with slots; what is left of N came from other ranks, as one more segment."""
    M = S // K
    own = torch.arange(M + 1, device=device) * min(P, N // M)
    foreign = int(own[-1]) < N
    offsets = torch.cat([own, torch.tensor([N], device=device)]) if foreign else own
    samples = torch.cat([torch.arange(M, device=device) // 3, torch.full((int(foreign),), -1, device=device)])
    selected = own[:-1, None] + torch.arange(K, device=device)
    return {
        "prediction": torch.randn(S, D, device=device, dtype=dtype, requires_grad=True),
        "candidates": torch.randn(N, D, device=device, dtype=dtype),
        "target_index": selected.flatten(),
        "segment_of_slot": torch.arange(M, device=device).repeat_interleave(K),
        "candidate_offsets": offsets,
        "selected": selected,
        "temperature": 0.1,
        "negatives": negatives,
        "sample_of_segment": samples,
        "noise": None,
    }


def topk_arguments(N: int, D: int, device: str, dtype: torch.dtype) -> dict[str, Any]:
    M = max(1, N // P)
    return {
        "query": torch.randn(M, D, device=device),
        "candidates": torch.randn(N, D, device=device, dtype=dtype),
        "candidate_offsets": torch.arange(M + 1, device=device) * (N // M),
        "k": K,
        "top_p": 0.9,
        "temperature": 0.1,
    }


def peak_mib(call: Callable[[], Any], device: str) -> float:
    if device == "cpu":
        return float("nan")
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def both_ways(loss: Callable[..., Any], arguments: dict[str, Any]) -> Callable[[], Any]:
    def call() -> Any:
        alignment, contrastive = loss(**arguments)
        return torch.autograd.grad(alignment.sum() + contrastive.sum(), arguments["prediction"])

    return call


def row(
    name: str, size: tuple[int, int, int], megabytes: float, calls: dict[str, Callable[[], Any]], timer: Timer
) -> list[str]:
    """One line of the table: a call of each version."""
    times, peaks = {}, {}
    for version, call in calls.items():
        try:
            times[version] = timer(call)
            peaks[version] = peak_mib(call, timer.device)
        except torch.OutOfMemoryError:
            times[version] = peaks[version] = float("inf")
        torch.compiler.reset()
    ours = times["ours"]
    cells = [name, *map(str, size)]
    for version in ("eager", "compiled", "ours"):
        cells.append(f"{times[version]:.3f}" if version in times else "-")
    cells += [f"{times[version] / ours:.1f}" if version in times else "-" for version in ("eager", "compiled")]
    cells += [f"{megabytes / ours:.0f}", *(f"{peaks[version]:.0f}" for version in ("eager", "ours"))]
    print("| " + " | ".join(cells) + " |", flush=True)
    return cells


def copy_bandwidth(timer: Timer) -> float:
    """GB/s of a device copy, read and written."""
    size = 2**31 if timer.device == "cuda" else 2**27
    source = torch.empty(size, dtype=torch.int8, device=timer.device).random_(0, 100)
    target = torch.empty_like(source)
    return 2 * size / timer(lambda: target.copy_(source)) / 1e6


def describe(device: str) -> str:
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    machine = f"{torch.get_num_threads()} threads"
    if device == "cuda":
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        driver = subprocess.run(query, capture_output=True, text=True, check=False).stdout.split("\n")[0]
        machine = f"{torch.cuda.get_device_name()}, driver {driver}"
    day = time.strftime("%Y-%m-%d")
    return f"{machine}, torch {torch.__version__}, {day}, commit {commit.stdout.strip() or 'unknown'}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seconds", type=float, default=0.3, help="about how long each version is timed")
    parser.add_argument("--widths", type=int, nargs="+")
    parser.add_argument("--sizes", nargs="+", metavar="S,N")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--no-compiled", action="store_true", help="skip the compiled reference, which takes minutes")
    options = parser.parse_args()
    device, dtype = options.device, getattr(torch, options.dtype)
    sizes = [tuple(map(int, size.split(","))) for size in options.sizes or []] or SIZES
    torch.manual_seed(0)
    timer = Timer(device, options.seconds)
    load()
    print(f"{describe(device)}, {options.dtype}; device copy {copy_bandwidth(timer):.0f} GB/s")
    head = ["op", "S", "N", "D", "eager ms", "compiled ms", "ours ms", "x eager", "x compiled", "GB/s"]
    print("| " + " | ".join([*head, "eager MiB", "ours MiB"]) + " |\n" + "|---" * 12 + "|")
    for D in options.widths or [2048, 3584]:
        for S, N in sizes:
            megabytes = N * D * dtype.itemsize / 1e6

            def versions(ours: Any, plain: Any, wrap: Callable[[Any], Callable[[], Any]]) -> dict[str, Any]:
                calls = {"eager": wrap(plain), "ours": wrap(ours)}
                if not options.no_compiled:
                    calls["compiled"] = wrap(torch.compile(plain, dynamic=False))
                return calls

            given = topk_arguments(N, D, device, dtype)
            calls = versions(selective_topk, reference.selective_topk, lambda f, g=given: lambda: f(**g))
            row("top-k", (len(given["query"]), N, D), megabytes, calls, timer)
            for negatives in ("segment", "all") if sizes[-1] != (S, N) and N < 10_000 else ("all",):
                given = loss_arguments(S, N, D, device, dtype, negatives)
                quiet = given | {"prediction": given["prediction"].detach()}
                pair = (selective_contrastive_loss, reference.selective_contrastive_loss)
                forward = versions(*pair, lambda f, g=quiet: lambda: f(**g))
                row(f"loss, {negatives}", (S, N, D), megabytes, forward, timer)
                both = versions(*pair, lambda f, g=given: both_ways(f, g))
                row(f"loss, {negatives}, and backward", (S, N, D), 2 * megabytes, both, timer)
            del given


if __name__ == "__main__":
    main()
