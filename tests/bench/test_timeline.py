from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch.autograd import DeviceType

from tests.bench.timeline import length, merged, timeline


def event(name: str, start: float, end: float, device: Any = DeviceType.CUDA, id: int = 0, **more: Any) -> Any:
    span = SimpleNamespace(start=start, end=end)
    return SimpleNamespace(name=name, time_range=span, device_type=device, id=id, **more)


def test_time_that_overlaps_counts_once() -> None:
    assert merged([(5, 6), (0, 2), (1, 3), (3, 4)]) == [(0, 4), (5, 6)]
    assert length([(0, 2), (1, 3), (10, 11)]) == 4


def test_what_the_device_did_by_kind_alone_and_idle() -> None:
    """Catches a sum over streams in the place of time, and an annotation taken for work."""
    text = timeline(
        [
            event("gemm", 0, 4000),
            event("ncclDevKernel_AllGather", 3000, 6000),
            event("Memcpy HtoD", 5000, 5500),
            event("gemm", 8000, 10000),
            event("a range", 0, 20000, is_user_annotation=True),
            event("cudaEventSynchronize", 100, 2100, DeviceType.CPU),
            event("aten::mm", 100, 2100, DeviceType.CPU),
        ]
    )
    assert text.splitlines() == [
        "10.0 ms from the device's first work to its last; idle 2.0 ms (20.0%)",
        "  computing: 6.0 ms (60.0%), alone 5.0 ms (50.0%)",
        "  NCCL: 3.0 ms (30.0%), alone 1.5 ms (15.0%)",
        "  copies: 0.5 ms (5.0%), alone 0.0 ms (0.0%)",
        "  the host in cudaEventSynchronize: 2.0 ms (20.0%), 1 calls",
    ]


def test_how_far_the_host_is_ahead() -> None:
    """Catches a launch that is taken for another kernel's, and NCCL's own waiting counted as the host's lead."""
    text = timeline(
        [
            event("cudaLaunchKernel", 0, 5, DeviceType.CPU, id=1),
            event("cuLaunchKernelEx", 10, 15, DeviceType.CPU, id=2),
            event("cudaLaunchKernelExC", 20, 25, DeviceType.CPU, id=3),
            event("aten::mm", 0, 30, DeviceType.CPU, id=2),
            event("gemm", 20, 3000, id=1),
            event("gemm", 3010, 4000, id=2),
            event("ncclDevKernel_AllGather", 9000, 9500, id=3),
        ]
    )
    assert text.splitlines()[4] == "  the host's lead: 1.51 ms in the median; 50.0% of 2 kernels started at once"


def test_torchs_own_events_have_what_is_read() -> None:
    """Catches an attribute of torch's events that a release names otherwise."""
    with torch.profiler.profile() as profile:
        torch.ones(10).sum()
    assert timeline(profile.events()) == "the device did nothing\n"
