"""Small observers of a run: memory, load of the hosts, the wish to stop, a line of progress."""

from __future__ import annotations

import logging
import os
import resource
import signal
import sys
import time
from collections.abc import Mapping
from contextlib import ExitStack
from types import FrameType
from typing import Any

import psutil
import torch
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from ilvr_ds import dist

logger = logging.getLogger("ilvr_ds")
GIB = 2**30


class MemoryMonitor:
    """Peak memory of this process: on its device, and on the host."""

    def take(self) -> dict[str, float]:
        """Peaks since the start, in GiB."""
        peak_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        metrics = {"memory/peak_host_gib": peak_kib * 1024 / GIB}
        if dist.device().type == "cuda":
            metrics["memory/peak_device_gib"] = torch.cuda.max_memory_allocated() / GIB
        return metrics

    def summary(self) -> str:
        """The peaks in words."""
        return ", ".join(f"{name.split('/')[1]} {value:.1f}" for name, value in self.take().items())


class NodeMonitor:
    """How busy this process' host and its own GPU are; of the others, asking alone would take half a GiB of each."""

    def __init__(self) -> None:
        psutil.cpu_percent()  # it counts from the call before
        self.gpu = dist.device().index if dist.device().type == "cuda" else None
        self.asks_nvml = self.gpu is not None

    def take(self) -> dict[str, float]:
        """CPU load since the last call in percent, memory in use in GiB, network traffic since boot in GiB.

        Memory of a GPU is what all its processes use, its load the percentage of the last second or less in which some
        kernel ran (NVML).
        """
        network = psutil.net_io_counters()
        metrics = {
            "cpu_percent": psutil.cpu_percent(),
            "host_memory_gib": psutil.virtual_memory().used / GIB,
            "network_sent_gib": network.bytes_sent / GIB,
            "network_received_gib": network.bytes_recv / GIB,
        }
        if self.gpu is not None:
            free, total = torch.cuda.mem_get_info(self.gpu)
            metrics[f"gpu{self.gpu}_memory_gib"] = (total - free) / GIB
        return metrics | self._gpu_load()

    def _gpu_load(self) -> dict[str, float]:
        """Load of the GPU; where NVML does not tell, that is said once (the package: by one process of the host)."""
        if not self.asks_nvml:
            return {}
        try:
            import pynvml  # torch asks through it
        except ImportError:
            if dist.local_rank() == 0:
                logger.warning("the load of the GPUs is not recorded: pip install nvidia-ml-py")
        else:
            try:
                return {f"gpu{self.gpu}_percent": float(torch.cuda.utilization(self.gpu))}
            except (RuntimeError, pynvml.NVMLError) as error:  # no driver; a part of a GPU (MIG) has no load of its own
                reason = str(error).strip() or type(error).__name__
                logger.warning("the load of GPU %d is not recorded: %s", self.gpu, reason)
        self.asks_nvml = False
        return {}


def of_all_ranks(memory: Mapping[str, float], node: Mapping[str, float]) -> dict[str, float]:
    """Peaks of the rank that needs most, and `system/HOST/...` of every host and of the GPU of each of its ranks
    (collective, through host memory)."""
    mine = (os.uname().nodename, dist.local_rank(), dict(memory), dict(node))
    metrics: dict[str, float] = {}
    for host, local_rank, peaks, load in dist.gather_on_host(mine):
        metrics |= {name: max(value, metrics.get(name, 0.0)) for name, value in peaks.items()}
        shown = {name: value for name, value in load.items() if local_rank == 0 or name.startswith("gpu")}
        metrics |= {f"system/{host}/{name}": value for name, value in shown.items()}
    return metrics


def _memory(metrics: Mapping[str, float]) -> float:
    """Peak memory that the progress shows: the device's, where there is one."""
    return metrics.get("memory/peak_device_gib", metrics.get("memory/peak_host_gib", 0.0))


class StopSignal:
    """Within its block SIGTERM, SIGINT, SIGUSR1 and SIGUSR2 ask to stop after the step; the same one again ends the
    process at once.

    The same one: launchers answer a Ctrl-C with a SIGTERM of their own to every rank, and schedulers send SIGTERM some
    time after the warning.
    """

    SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)

    def __init__(self) -> None:
        self.requested = False
        self._seen: set[int] = set()
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopSignal:
        self._before = {number: signal.signal(number, self._handle) for number in self.SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, _: FrameType | None) -> None:
        if number in self._seen:
            os._exit(128 + number)
        self._seen.add(number)
        self.requested = True


class Progress:
    """A bar on a terminal, else a plain line per log interval; only on the main rank."""

    def __init__(self, total_steps: int, is_main: bool) -> None:
        self.total = total_steps
        self.is_main = is_main
        self._bar: Any = None
        self._while_bar = ExitStack()
        self._first: tuple[int, float] | None = None

    def begin(self, done: int) -> None:
        """The first step comes next, after `done` of an earlier start, which do not count for the time left."""
        if self.is_main and sys.stderr.isatty():
            self._bar = tqdm(total=self.total, initial=done, unit="step", dynamic_ncols=True)
            self._while_bar.enter_context(logging_redirect_tqdm([logger]))  # lines go above the bar

    def update(self, done: int, metrics: Mapping[str, float]) -> None:
        """Show the state after `done` steps."""
        if not self.is_main:
            return
        speed = metrics["speed/tokens_per_s"]
        names = {"loss": "loss/total", "ce": "loss/ce", "align": "loss/alignment"}
        shown = {short: metrics[name] for short, name in names.items() if name in metrics}
        if self._bar is not None:
            rest = {"tok/s": f"{speed:.0f}", "GiB": f"{_memory(metrics):.1f}"}
            self._bar.set_postfix({**{k: f"{v:.3f}" for k, v in shown.items()}, **rest}, refresh=False)
            self._bar.update(done - self._bar.n)
            return
        losses = "  ".join(f"{name} {value:.4f}" for name, value in shown.items())
        memory = _memory(metrics)
        logger.info(
            "step %d/%d  %s  %.0f tokens/s  %.1f GiB%s", done, self.total, losses, speed, memory, self._eta(done)
        )

    def close(self) -> None:
        """Leave the bar as it is."""
        if self._bar is not None:
            self._bar.close()
        self._while_bar.close()

    def _eta(self, done: int) -> str:
        now = time.monotonic()
        if self._first is None:
            self._first = (done, now)
            return ""
        steps, since = done - self._first[0], now - self._first[1]
        left = int(since / max(1, steps) * (self.total - done))
        return f"  {left // 3600}:{left // 60 % 60:02}:{left % 60:02} left"
