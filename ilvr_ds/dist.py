"""Ranks and the few collectives that are not DeepSpeed's: the door to torch.distributed.

Without an initialised process group everything works as in a job of one rank.
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
from torch.distributed import TCPStore, distributed_c10d  # type: ignore[attr-defined]

from ilvr_ds import launcher
from ilvr_ds.errors import UserError

logger = logging.getLogger("ilvr_ds")
T = TypeVar("T")
POLL_S = 0.05
_REPEATS = 5
"""Calls that a speed is measured over."""


def rank() -> int:
    """Number of this process in the job."""
    return torch_dist.get_rank() if torch_dist.is_initialized() else 0


def world_size() -> int:
    """Number of processes in the job."""
    return torch_dist.get_world_size() if torch_dist.is_initialized() else 1


def local_rank() -> int:
    """Number of this process on its host, as the launcher says."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def is_main() -> bool:
    """Whether this is the one process that writes files and logs."""
    return rank() == 0


def device() -> torch.device:
    """The device of this process; DS_ACCELERATOR=cpu keeps it off the GPUs, as it does DeepSpeed."""
    on_gpu = torch.cuda.is_available() and os.environ.get("DS_ACCELERATOR", "cuda") == "cuda"
    return torch.device("cuda", local_rank()) if on_gpu else torch.device("cpu")


def backend() -> str:
    """The torch.distributed backend for `device()`."""
    return "nccl" if device().type == "cuda" else "gloo"


def enter() -> launcher.Place:
    """Find this process' place in its job and select its device, before any communication. Raises UserError."""
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


def set_default_timeout(timeout: timedelta) -> None:
    """Let collectives fail after `timeout`, in every process group that is created from now on without one.

    Such are the gloo group beside NCCL, and those of DeepSpeed's engines. Torch's own default is 10 minutes for NCCL
    and 30 for gloo, whatever the job's first group was given.
    """
    distributed_c10d.default_pg_timeout = timeout
    distributed_c10d.default_pg_nccl_timeout = timeout  # type: ignore[attr-defined]


def join_alone(timeout: timedelta) -> None:
    """Make this process a job of one, where it is none yet.

    Nobody has to find it, so it listens on whichever port is free at that moment: the launcher's may be another job's,
    and one that was free some seconds ago may be gone.
    """
    if not torch_dist.is_initialized():
        store = TCPStore("127.0.0.1", 0, 1, is_master=True, timeout=timeout)
        torch_dist.init_process_group(backend(), store=store, rank=0, world_size=1, timeout=timeout)


def join_on_host(timeout: timedelta) -> None:
    """Join the launcher's job over gloo alone, for work without device collectives; one process needs no group."""
    set_default_timeout(timeout)
    place = enter()
    if place.world_size > 1 and not torch_dist.is_initialized():
        torch_dist.init_process_group("gloo", timeout=timeout)


def join(timeout: timedelta) -> None:
    """Join the launcher's job over the devices' backend; one process needs no group."""
    set_default_timeout(timeout)
    if enter().world_size > 1 and not torch_dist.is_initialized():
        torch_dist.init_process_group(backend(), timeout=timeout)


def speeds(groups: list[list[int]], num_bytes: int) -> tuple[float, float]:
    """GB/s of an all-reduce and an all-gather of `num_bytes` in this rank's group, all groups at once (collective).

    It is the bus bandwidth of nccl-tests, comparable to the link's whatever the number of ranks. 0 for a rank without a
    group. Raises RuntimeError where a sum is wrong.
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
        for _ in range(_REPEATS):
            call()
        if device().type == "cuda":
            torch.cuda.synchronize()
        return (time.perf_counter() - start) / _REPEATS

    share = sent.nbytes * (size - 1) / size / 1e9
    reduced = seconds(lambda: torch_dist.all_reduce(sent, group=group))
    gathered = seconds(lambda: torch_dist.all_gather_into_tensor(sent, part, group=group))
    return 2 * share / reduced, share / gathered


def sum_over_ranks(tensor: torch.Tensor) -> torch.Tensor:
    """All-reduce: sum in place over all ranks, on the tensor's device; the host does not wait."""
    if world_size() > 1:
        torch_dist.all_reduce(tensor)
    return tensor


def broadcast_from_main(tensor: torch.Tensor) -> None:
    """Overwrite the tensor of every rank with the main rank's."""
    if world_size() > 1:
        torch_dist.broadcast(tensor, 0)


def all_to_all(sent: torch.Tensor, sent_counts: list[int], received_counts: list[int]) -> torch.Tensor:
    """Send each rank its slice of `sent` (one dimension, `sent_counts[rank]` elements each, in the order of ranks).

    Returns the slices received, `received_counts[rank]` elements from each. With a GPU the host does not wait."""
    if world_size() == 1:
        return sent
    received = sent.new_empty(sum(received_counts))
    torch_dist.all_to_all_single(received, sent, received_counts, sent_counts)
    return received


def all_gather_rows(rows: torch.Tensor, counts: list[int]) -> list[torch.Tensor]:
    """The `rows` [counts[rank], D] of every rank; all ranks give the same `counts`."""
    if world_size() == 1:
        return [rows]
    padded = rows.new_zeros(max(counts), rows.shape[1])
    padded[: len(rows)] = rows
    gathered = [torch.empty_like(padded) for _ in counts]
    torch_dist.all_gather(gathered, padded)
    return [part[:count] for part, count in zip(gathered, counts, strict=True)]


def gather_on_host(value: T) -> list[T]:
    """All-gather the picklable `value` of every rank through host memory, without synchronising the device."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    torch_dist.all_gather_object(values, value, group=_host_group())
    return values


def decided_by_main(decide: Callable[[], T]) -> T:
    """Return on every rank what `decide` returns on the main one. A UserError there is raised on every rank."""
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
    """Run `work(True)` on the first rank of each host, and then `work(False)` on the others, which find it done.

    A UserError on any rank is raised on every rank.
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
    """Log a warning that concerns the whole job, on the main rank alone."""
    if is_main():
        logger.warning(message, *arguments)


def barrier(meanwhile: Callable[[], object] | None = None) -> None:
    """Block the host until every rank is here. With `meanwhile`, called again and again, it hears signals, too."""
    if world_size() > 1:
        work = torch_dist.barrier(group=_host_group(), async_op=meanwhile is not None)
        while work is not None and meanwhile is not None and not work.is_completed():
            meanwhile()
            time.sleep(POLL_S)
        if work is not None:
            work.wait()


def tell_all_to_stop() -> None:
    """Let every rank see it by `is_told_to_stop`, as long as the job's group lives; nobody waits."""
    if world_size() > 1:
        _store().set(_STOP, "1")


def is_told_to_stop() -> bool:
    """Whether some rank has told all to stop; a question to the main rank's host, not a collective."""
    return world_size() > 1 and bool(_store().check([_STOP]))


def close() -> None:
    """End the process group, so that no rank is left waiting for another."""
    global _gloo
    _gloo = None
    if torch_dist.is_initialized():
        torch_dist.destroy_process_group()


_gloo: Any = None
_STOP = "ilvr_ds/stop"


def _store() -> Any:
    """Through which the ranks found each other: keys and values, on the main rank's host."""
    return torch_dist.group.WORLD.get_group_store()  # type: ignore[union-attr]


def _host_group() -> Any:
    """The gloo group beside NCCL for agreement on the host. Its first use, which creates it, is collective."""
    global _gloo
    if _gloo is None:
        _gloo = torch_dist.group.WORLD if torch_dist.get_backend() == "gloo" else torch_dist.new_group(backend="gloo")
    return _gloo
