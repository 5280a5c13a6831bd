from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch.autograd import DeviceType

from tests.bench.timeline import length, merged, timeline


def event(name: str, start: float, end: float, device: Any = DeviceType.CUDA, **more: Any) -> Any:
    return SimpleNamespace(name=name, time_range=SimpleNamespace(start=start, end=end), device_type=device, **more)


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


def test_torchs_own_events_have_what_is_read() -> None:
    """Catches an attribute of torch's events that a release names otherwise."""
    with torch.profiler.profile() as profile:
        torch.ones(10).sum()
    assert timeline(profile.events()) == "the device did nothing\n"
