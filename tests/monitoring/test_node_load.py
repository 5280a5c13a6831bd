from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest
import torch

from ilvr_ds.monitoring import node_load
from ilvr_ds.monitoring.memory import GIB
from ilvr_ds.monitoring.node_load import NodeMonitor, of_all_ranks


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The second of two GPUs, as far as a NodeMonitor asks; their loads, of which an exception is raised."""
    loads: list[float] = [40, 75]

    def load(number: int) -> float:
        if isinstance(loads[number], Exception):
            raise loads[number]
        return loads[number]

    monkeypatch.setattr(node_load.dist, "device", lambda: torch.device("cuda", 1))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda number: (GIB, (number + 2) * GIB))
    monkeypatch.setattr(torch.cuda, "utilization", load)
    monkeypatch.setitem(sys.modules, "pynvml", SimpleNamespace(NVMLError=KeyError))
    return loads


def test_a_rank_asks_for_load_and_memory_of_its_own_gpu_alone(gpus: list[float]) -> None:
    """Catches a context of each rank on every GPU, which costs half a GiB there."""
    metrics = NodeMonitor().take()
    assert (metrics["gpu1_memory_gib"], metrics["gpu1_percent"]) == (2, 75)
    assert not any(name.startswith("gpu0") for name in metrics)


def test_a_host_is_shown_once_and_the_gpus_of_all_its_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    ranks = [
        ("here", 0, {"peak": 1.0}, {"cpu_percent": 30.0, "gpu0_percent": 40.0}),
        ("here", 1, {"peak": 3.0}, {"cpu_percent": 31.0, "gpu1_percent": 75.0}),
        ("there", 0, {"peak": 2.0}, {"cpu_percent": 32.0, "gpu0_percent": 10.0}),
    ]
    monkeypatch.setattr(node_load.dist, "gather_on_host", lambda mine: ranks)
    assert of_all_ranks({}, {}) == {
        "peak": 3.0,
        "system/here/cpu_percent": 30.0,
        "system/here/gpu0_percent": 40.0,
        "system/here/gpu1_percent": 75.0,
        "system/there/cpu_percent": 32.0,
        "system/there/gpu0_percent": 10.0,
    }


def test_without_nvml_the_load_is_missing_and_that_is_said_once(
    gpus: list[float], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Catches a run that ends because a driver does not tell, and one that goes on without a word."""
    gpus[1] = KeyError("Not Supported")
    monkeypatch.setattr(node_load.dist, "local_rank", lambda: 1)
    node = NodeMonitor()
    assert all("gpu1_memory_gib" in node.take() for _ in range(2))
    assert caplog.messages == ["the load of GPU 1 is not recorded: 'Not Supported'"], "by whichever rank it is"
    monkeypatch.setitem(sys.modules, "pynvml", None)
    monkeypatch.setattr(node_load.dist, "local_rank", lambda: 0)
    caplog.clear()
    node = NodeMonitor()
    assert not any("gpu1_percent" in node.take() for _ in range(2))
    [message] = caplog.messages
    assert "pip install nvidia-ml-py" in message
