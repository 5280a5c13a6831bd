from __future__ import annotations

from ilvr_ds.monitoring.memory import MemoryMonitor


def test_host_memory_is_in_gib() -> None:
    peak = MemoryMonitor().take()["memory/peak_host_gib"]
    assert 0.05 < peak < 50, "torch alone takes 0.2; other units are a factor of 1,000 away"
    assert MemoryMonitor().summary().startswith(f"peak_host_gib {peak:.1f}")
