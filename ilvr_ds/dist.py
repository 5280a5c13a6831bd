"""Ranks and the few collectives that are not DeepSpeed's: the door to torch.distributed.

Everything works without an initialised process group too, as one rank of one.
"""

from __future__ import annotations

import logging
import os
import socket
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as torch_dist
from torch.distributed import distributed_c10d

from ilvr_ds import launcher
from ilvr_ds.errors import UserError

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
    """The device of this process; DS_ACCELERATOR=cpu keeps it off the GPUs, as it does DeepSpeed."""
    on_gpu = torch.cuda.is_available() and os.environ.get("DS_ACCELERATOR", "cuda") == "cuda"
    return torch.device("cuda", local_rank()) if on_gpu else torch.device("cpu")


def backend() -> str:
    """The communication library for `device()`."""
    return "nccl" if device().type == "cuda" else "gloo"


def enter() -> launcher.Place:
    """Take this process' place in its job, and its device, before anything is sent. Raises UserError."""
    place = launcher.enter()
    if device().type == "cuda":
        if place.local_rank >= torch.cuda.device_count():
            raise UserError(
                f"rank {place.rank} is number {place.local_rank} on {socket.gethostname()} (from 0), but sees "
                f"{torch.cuda.device_count()} GPU; start one rank a GPU, each seeing all GPUs of its host "
                "(srun: --gres=gpu:N instead of --gpus-per-task=1)"
            )
        torch.cuda.set_device(device())
    return place


def set_patience(timeout: timedelta) -> None:
    """Let collectives fail after `timeout`, in every process group that is made from now on.

    Torch has one default for all groups whose maker names no time: the one beside NCCL for the host, and those of
    DeepSpeed's engines. It is 10 minutes for NCCL and 30 for gloo, whatever the job's first group was told.
    """
    distributed_c10d.default_pg_timeout = timeout
    distributed_c10d.default_pg_nccl_timeout = timeout  # type: ignore[attr-defined]


def join_on_host(timeout: timedelta) -> None:
    """Join the launcher's job over gloo alone, for work without device collectives; one process needs no group."""
    set_patience(timeout)
    place = enter()
    if place.world_size > 1 and not torch_dist.is_initialized():
        torch_dist.init_process_group("gloo", timeout=timeout)


def join(timeout: timedelta) -> None:
    """Join the launcher's job over the devices' own library; one process needs no group."""
    set_patience(timeout)
    if enter().world_size > 1 and not torch_dist.is_initialized():
        torch_dist.init_process_group(backend(), timeout=timeout)


def speeds(groups: list[list[int]], num_bytes: int, repeats: int = 5) -> tuple[float, float]:
    """GB/s of all-reduce and all-gather of `num_bytes` in this rank's group, all groups at once (collective).

    Counted as nccl-tests does (bus bandwidth): comparable to the wire's, whatever the number of ranks. 0 for a rank
    without a group. Raises RuntimeError where a sum is wrong.
    """
    made = [torch_dist.new_group(ranks) for ranks in groups]
    mine = next((number for number, ranks in enumerate(groups) if rank() in ranks), None)
    if mine is None:
        return 0.0, 0.0
    size, group = len(groups[mine]), made[mine]
    sent = torch.ones(num_bytes // 4 // size * size, device=device())
    torch_dist.all_reduce(sent, group=group)  # also opens the connections
    if not bool((sent == size).all()):
        raise RuntimeError(f"an all-reduce of ones over {size} ranks gave {float(sent.min())} to {float(sent.max())}")
    part = sent[: len(sent) // size].clone()

    def seconds(call: Callable[[], Any]) -> float:
        torch_dist.barrier(group=group)
        start = time.perf_counter()
        for _ in range(repeats):
            call()
        if device().type == "cuda":
            torch.cuda.synchronize()
        return (time.perf_counter() - start) / repeats

    share = sent.nbytes * (size - 1) / size / 1e9
    reduced = seconds(lambda: torch_dist.all_reduce(sent, group=group))
    gathered = seconds(lambda: torch_dist.all_gather_into_tensor(sent, part, group=group))
    return 2 * share / reduced, share / gathered


def sum_over_ranks(tensor: torch.Tensor) -> torch.Tensor:
    """Sum in place over all ranks, on the tensor's device, without waiting for the result on the host."""
    if world_size() > 1:
        torch_dist.all_reduce(tensor)
    return tensor


def send_from_main(tensor: torch.Tensor) -> None:
    """Overwrite a tensor, on every rank, with the main rank's."""
    if world_size() > 1:
        torch_dist.broadcast(tensor, 0)


def exchange(sent: torch.Tensor, sent_counts: list[int], received_counts: list[int]) -> torch.Tensor:
    """`sent_counts[rank]` elements of the 1-dimensional `sent` to each rank, one after the other; returns what came,
    `received_counts[rank]` elements from each, likewise. The host does not wait for them on a GPU."""
    if world_size() == 1:
        return sent
    received = sent.new_empty(sum(received_counts))
    torch_dist.all_to_all_single(received, sent, received_counts, sent_counts)
    return received


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


def decided_by_main(decide: Callable[[], T]) -> T:
    """What `decide` returns on the main process, on every rank; a UserError there is raised on every rank."""
    box: list[Any] = [None]
    if is_main():
        try:
            box = [decide()]
        except UserError as error:
            box = [error]
    if world_size() > 1:
        torch_dist.broadcast_object_list(box, src=0, group=_host_group())
    if isinstance(box[0], UserError):
        raise box[0]
    result: T = box[0]
    return result


def first_on_host(work: Callable[[bool], T]) -> T:
    """`work(True)` on the first rank of each host, and only then `work(False)` on the others, which find it done.

    A UserError of any rank is raised on every rank.
    """
    box: list[T] = []

    def turn(is_mine: bool, is_first: bool) -> None:
        error = None
        if is_mine:
            try:
                box.append(work(is_first))
            except UserError as raised:
                error = raised
        if failed := next((error for error in gather_on_host(error) if error), None):
            raise failed

    turn(local_rank() == 0, is_first=True)
    turn(local_rank() != 0, is_first=False)
    return box[0]


def warn(message: str, *arguments: object) -> None:
    """Log a warning that concerns the whole job: the main rank says it."""
    if is_main():
        logger.warning(message, *arguments)


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
        _gloo = torch_dist.group.WORLD if torch_dist.get_backend() == "gloo" else torch_dist.new_group(backend="gloo")
    return _gloo
