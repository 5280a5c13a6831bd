"""Ranks and the few collectives that are not DeepSpeed's: the door to torch.distributed.

Everything works without an initialised process group too, as one rank of one.
"""

from __future__ import annotations

import logging
import os
import socket
from typing import Any, TypeVar

import torch
import torch.distributed as torch_dist

logger = logging.getLogger("ilvr_ds")
T = TypeVar("T")


def rank() -> int:
    """Number of this process in the job."""
    return torch_dist.get_rank() if torch_dist.is_initialized() else 0


def world_size() -> int:
    """Number of processes in the job."""
    return torch_dist.get_world_size() if torch_dist.is_initialized() else 1


def local_rank() -> int:
    """Number of this process on its host, as the launcher set it."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def is_main() -> bool:
    """True on the one process that writes and speaks."""
    return rank() == 0


def device() -> torch.device:
    """The device of this process."""
    return torch.device("cuda", local_rank()) if torch.cuda.is_available() else torch.device("cpu")


def backend() -> str:
    """The communication library for `device()`."""
    return "nccl" if torch.cuda.is_available() else "gloo"


def fill_in_environment() -> None:
    """Let a process that no launcher started be a job of one rank."""
    if "RANK" in os.environ:
        return
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    os.environ |= {
        "RANK": "0",
        "LOCAL_RANK": "0",
        "WORLD_SIZE": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }


def sum_over_ranks(tensor: torch.Tensor) -> torch.Tensor:
    """Sum in place over all ranks, on the tensor's device, without waiting for the result on the host."""
    if world_size() > 1:
        torch_dist.all_reduce(tensor)
    return tensor


def gather_rows(rows: torch.Tensor, counts: list[int]) -> list[torch.Tensor]:
    """The `rows` [counts[rank], D] of every rank; `counts` must be the same list everywhere."""
    if world_size() == 1:
        return [rows]
    padded = rows.new_zeros(max(counts), rows.shape[1])
    padded[: len(rows)] = rows
    gathered = [torch.empty_like(padded) for _ in counts]
    torch_dist.all_gather(gathered, padded)
    return [part[:count] for part, count in zip(gathered, counts, strict=True)]


def gather_on_host(value: T) -> list[T]:
    """The picklable `value` of every rank, through host memory (never a device synchronisation)."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    torch_dist.all_gather_object(values, value, group=_host_group())
    return values


def broadcast_from_main(value: T) -> T:
    """The main process's picklable `value` on every rank."""
    if world_size() == 1:
        return value
    box = [value]
    torch_dist.broadcast_object_list(box, src=0, group=_host_group())
    return box[0]


def barrier() -> None:
    """Wait on the host until every rank is here."""
    if world_size() > 1:
        torch_dist.barrier(group=_host_group())


def close() -> None:
    """End the process group, so that no rank is left waiting for another."""
    global _gloo
    _gloo = None
    if torch_dist.is_initialized():
        torch_dist.destroy_process_group()


_gloo: Any = None


def _host_group() -> Any:
    """A gloo group beside NCCL for agreement on the host; made on first use, which every rank makes together."""
    global _gloo
    if _gloo is None:
        _gloo = torch_dist.group.WORLD if backend() == "gloo" else torch_dist.new_group(backend="gloo")
    return _gloo
