"""Ranks and devices; collectives are tested in tests/distributed."""

from __future__ import annotations

from datetime import timedelta

import pytest
import torch
from torch.distributed import distributed_c10d

from ilvr_ds import dist
from ilvr_ds.errors import UserError
from ilvr_ds.launcher import Place


def test_more_ranks_than_gpus_is_a_mistake(monkeypatch: pytest.MonkeyPatch) -> None:
    """`srun --gpus-per-task=1` hides the other GPUs: torch would say "invalid device ordinal" on each rank but one."""
    for name, value in Place(3, 3, 8, "node-1", 29500).variables().items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(UserError, match=r"rank 3 is number 3 on \S+ \(from 0\), but sees 1 GPU; .*--gres=gpu:N"):
        dist.enter()


def test_groups_whose_maker_names_no_time_have_the_jobs_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """DeepSpeed's groups and the host's. Catches a torch that keeps its defaults elsewhere."""
    for name in ("default_pg_timeout", "default_pg_nccl_timeout"):
        monkeypatch.setattr(distributed_c10d, name, getattr(distributed_c10d, name))  # to have it back afterwards
    dist.set_default_timeout(timedelta(hours=2))
    assert [distributed_c10d._get_default_timeout(name) for name in ("nccl", "gloo")] == [timedelta(hours=2)] * 2
