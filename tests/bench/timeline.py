"""What the device did in a profile, and for what the host waited: says which of them a step is limited by."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from statistics import median
from typing import Any

from torch.autograd import DeviceType

Span = tuple[float, float]
AT_ONCE = 50.0
"""Microseconds from a launch by the host to the kernel's start that are no waiting in a queue."""


def merged(spans: Iterable[Span]) -> list[Span]:
    """The same time as spans that neither overlap nor touch, in order."""
    found: list[Span] = []
    for start, end in sorted(spans):
        if found and start <= found[-1][1]:
            found[-1] = (found[-1][0], max(end, found[-1][1]))
        else:
            found.append((start, end))
    return found


def length(spans: Iterable[Span]) -> float:
    """Time in at least one of `spans`."""
    return sum(end - start for start, end in merged(spans))


def timeline(events: Iterable[Any]) -> str:
    """A profile's events in a few lines.

    Computing, copies and NCCL run side by side: "alone" is the time in which the device did nothing else. Idle is what
    is left between the first and the last of its work: there it waited for the host. The host's waits are the time in
    CUDA's calls whose names say so (the profile's own at its end among them). The host's lead is the time from the
    launch of a computing kernel to its start: where many start at once, the host is the limit.
    """
    spans: dict[str, list[Span]] = {"computing": [], "NCCL": [], "copies": []}
    waits: Counter[str] = Counter()
    calls: Counter[str] = Counter()
    launched: dict[int, float] = {}
    started: dict[int, float] = {}
    for event in events:
        span = (event.time_range.start, event.time_range.end)
        if event.device_type == DeviceType.CPU:
            if "Synchronize" in event.name:
                waits[event.name] += span[1] - span[0]
                calls[event.name] += 1
            elif event.name.startswith(("cudaLaunch", "cuLaunch")):
                launched[event.id] = span[0]
        elif not getattr(event, "is_user_annotation", False):
            kind = "NCCL" if "nccl" in event.name.lower() else "copies" if event.name.startswith("Mem") else "computing"
            spans[kind].append(span)
            if kind == "computing":
                started[event.id] = span[0]
    work = [span for kind in spans.values() for span in kind]
    if not work:
        return "the device did nothing\n"
    whole, busy = max(end for _, end in work) - min(start for start, _ in work), length(work)

    def share(time: float) -> str:
        return f"{time / 1000:.1f} ms ({time / whole:.1%})"

    lines = [f"{whole / 1000:.1f} ms from the device's first work to its last; idle {share(whole - busy)}"]
    for kind, own in spans.items():
        others = [span for other, spans_of in spans.items() if other != kind for span in spans_of]
        lines.append(f"  {kind}: {share(length(own))}, alone {share(busy - length(others))}")
    leads = [start - launched[number] for number, start in started.items() if number in launched]
    if leads:
        at_once = sum(lead < AT_ONCE for lead in leads) / len(leads)
        ahead = f"{median(leads) / 1000:.2f} ms in the median"
        lines.append(f"  the host's lead: {ahead}; {at_once:.1%} of {len(leads)} kernels started at once")
    for name, time in waits.most_common():
        lines.append(f"  the host in {name}: {share(time)}, {calls[name]} calls")
    return "\n".join(lines) + "\n"
