"""How busy the hosts of a run and their GPUs are."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping

import psutil
import torch

from ilvr_ds import dist
from ilvr_ds.monitoring.memory import GIB

logger = logging.getLogger("ilvr_ds")


class NodeMonitor:
    """Load of this process' host and of its own GPU. Asking about another GPU would cost half a GiB of its memory."""

    def __init__(self) -> None:
        psutil.cpu_percent()  # measures since the previous call
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
