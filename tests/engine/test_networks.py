from __future__ import annotations

from typing import Any

import pytest
import torch

from ilvr_ds.engine import networks
from ilvr_ds.engine.networks import check_optimizer
from ilvr_ds.errors import UserError


def test_a_missing_optimizer_is_told_before_weights_load(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(networks, "find_spec", lambda name: None)
    check_optimizer("adamw", {})
    with pytest.raises(UserError, match=r"optim\.name is adamw_8bit: needs bitsandbytes"):
        check_optimizer("adamw_8bit", {})


def test_what_deepspeed_prints_at_each_start_is_not_shown(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """ "DeepSpeed deepspeed_shm_comm_op built successfully", from each rank."""
    told: list[dict[str, Any]] = []

    def init(**settings: Any) -> None:
        told.append(settings)
        print("DeepSpeed something built successfully")

    monkeypatch.setattr(networks.deepspeed, "init_distributed", init)
    monkeypatch.setattr(networks, "_unlink_shared_memory", lambda: None)
    networks.init_process_group()
    assert len(told) == 1 and capsys.readouterr().out == ""


def test_adam_on_the_host_needs_its_states_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU it asserts, after all weights have been read."""
    monkeypatch.setattr(networks.dist, "device", lambda: torch.device("cuda"))
    check_optimizer("cpu_adam", {"zero_optimization": {"offload_optimizer": {"device": "cpu"}}})
    with pytest.raises(UserError, match=r"cpu_adam: needs offload_optimizer .*zero3_offload_optimizer\.json"):
        check_optimizer("cpu_adam", {"zero_optimization": {"stage": 3}})
