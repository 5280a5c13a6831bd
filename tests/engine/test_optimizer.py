from __future__ import annotations

import pytest
import torch

from ilvr_ds.engine import optimizer
from ilvr_ds.engine.optimizer import check_optimizer
from ilvr_ds.errors import UserError


def test_a_missing_optimizer_is_told_before_weights_load(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(optimizer, "find_spec", lambda name: None)
    check_optimizer("adamw", {})
    with pytest.raises(UserError, match=r"optim\.name is adamw_8bit: needs bitsandbytes"):
        check_optimizer("adamw_8bit", {})


def test_adam_on_the_host_needs_its_states_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU it asserts, after all weights have been read."""
    monkeypatch.setattr(optimizer.dist, "device", lambda: torch.device("cuda"))
    check_optimizer("cpu_adam", {"zero_optimization": {"offload_optimizer": {"device": "cpu"}}})
    with pytest.raises(UserError, match=r"cpu_adam: needs offload_optimizer .*zero3_offload_optimizer\.json"):
        check_optimizer("cpu_adam", {"zero_optimization": {"stage": 3}})
