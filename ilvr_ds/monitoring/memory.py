"""Peak memory of a rank."""

from __future__ import annotations

import resource

import torch

from ilvr_ds import dist

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
