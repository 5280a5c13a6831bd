"""Which rank this process is, whoever started it: deepspeed, torchrun, srun, or nobody.

DeepSpeed, torch.distributed and everything here read RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT from the
environment. This is the one place that fills them in.
"""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Mapping
from dataclasses import dataclass

from ilvr_ds.errors import UserError

_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
FIRST_PORT, NUM_PORTS = 12_000, 20_000
"""Range for Slurm jobs, below the ports that Linux gives to outgoing connections."""


@dataclass(frozen=True)
class Place:
    """The place of a process in its job."""

    rank: int
    local_rank: int
    """number of the process on its host, and of its GPU"""
    world_size: int
    master_addr: str
    """host of rank 0"""
    master_port: int

    def variables(self) -> dict[str, str]:
        """The environment variables that torch.distributed reads."""
        values = (self.rank, self.local_rank, self.world_size, self.master_addr, self.master_port)
        return dict(zip(_VARIABLES, map(str, values), strict=True))


def enter() -> Place:
    """Find this process' place and write it to the environment; calling it again is harmless. Raises UserError."""
    place = find_place(os.environ)
    os.environ.update(place.variables())
    return place


def find_place(environment: Mapping[str, str]) -> Place:
    """Read the place from a launcher's variables; without a launcher it is a job of one process.

    RANK comes first: deepspeed and torchrun set it, also inside a Slurm job. Raises UserError if the variables are
    incomplete or contradict each other: the alternative is several jobs of one rank side by side.
    """
    tasks = _number(environment, "SLURM_STEP_NUM_TASKS", 1)
    if "RANK" in environment:
        return _launched(environment, tasks)
    if tasks > 1:
        return _in_slurm_step(environment, tasks)
    if _number(environment, "WORLD_SIZE", 1) > 1:
        raise UserError(f"WORLD_SIZE is {environment['WORLD_SIZE']} but RANK is not set; {_REMEDY}")
    if _number(environment, "OMPI_COMM_WORLD_SIZE", 1) > 1:
        raise UserError(f"mpirun started {environment['OMPI_COMM_WORLD_SIZE']} processes; {_REMEDY}")
    if _number(environment, "SLURM_NTASKS", 1) > 1 and "SLURM_STEP_NUM_TASKS" not in environment:
        raise UserError(
            f"this Slurm job has {environment['SLURM_NTASKS']} tasks, but srun did not start this process; "
            "put srun before the command, or srun --ntasks=1 for one rank"
        )
    return Place(0, 0, 1, "127.0.0.1", _free_port())


_REMEDY = "start ranks by deepspeed, torchrun or srun, or unset it"


def _launched(environment: Mapping[str, str], tasks: int) -> Place:
    missing = [name for name in _VARIABLES if name not in environment]
    if missing:
        raise UserError(f"RANK is set but {', '.join(missing)} is not; {_REMEDY}")
    rank, local_rank, world_size, port = (
        _number(environment, name) for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_PORT")
    )
    if rank >= world_size:
        raise UserError(f"RANK is {rank} but WORLD_SIZE is {world_size}; ranks count from 0; {_REMEDY}")
    if local_rank > rank:
        raise UserError(f"LOCAL_RANK is {local_rank} but RANK is {rank}: a host cannot have more ranks; {_REMEDY}")
    if tasks > world_size:
        raise UserError(f"srun started {tasks} tasks but WORLD_SIZE is {world_size}; unset RANK to take srun's ranks")
    return Place(rank, local_rank, world_size, environment["MASTER_ADDR"], port)


def _in_slurm_step(environment: Mapping[str, str], tasks: int) -> Place:
    rank, local_rank = (_number(environment, name) for name in ("SLURM_PROCID", "SLURM_LOCALID"))
    told = _number(environment, "WORLD_SIZE", tasks)
    if told != tasks:
        raise UserError(f"WORLD_SIZE is {told} but srun started {tasks} tasks; unset WORLD_SIZE")
    nodes = environment.get("SLURM_STEP_NODELIST") or environment.get("SLURM_JOB_NODELIST", "")
    master = environment.get("MASTER_ADDR") or first_host(nodes)
    if "MASTER_PORT" in environment:
        return Place(rank, local_rank, tasks, master, _number(environment, "MASTER_PORT"))
    job, step = _number(environment, "SLURM_JOB_ID"), _number(environment, "SLURM_STEP_ID", 0)
    # jobs on the same nodes have close numbers, and so do steps of a job: neither may share a port
    return Place(rank, local_rank, tasks, master, FIRST_PORT + (job + 101 * step) % NUM_PORTS)


def first_host(nodes: str) -> str:
    """The first host of a Slurm node list: "gpu-a07" of "gpu-a[07-09,12],gpu-b3". Raises UserError if there is none.

    `scontrol show hostnames` says it too, but a thousand ranks would ask the controller at once.
    """
    first = re.split(r",(?![^\[]*\])", nodes)[0]
    host = re.sub(r"\[(\w+)[^\]]*\]", r"\1", first).strip()
    if not host or "[" in host:
        raise UserError(f"SLURM_STEP_NODELIST is '{nodes}': no host to be master; set MASTER_ADDR")
    return host


def _number(environment: Mapping[str, str], name: str, default: int | None = None) -> int:
    text = environment.get(name, "" if default is None else str(default))
    if not text.isdecimal():
        raise UserError(f"{name} is '{text}'; expected a number from 0; {_REMEDY}")
    return int(text)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
