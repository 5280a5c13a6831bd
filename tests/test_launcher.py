"""The place of a process in its job, from the variables of each launcher."""

from __future__ import annotations

import pytest

from ilvr_ds.errors import UserError
from ilvr_ds.launcher import FIRST_PORT, NUM_PORTS, Place, find_place, first_host

TORCHRUN = Place(11, 3, 16, "node-1", 29500).variables()
SRUN = {
    "SLURM_JOB_ID": "4711",
    "SLURM_STEP_ID": "0",
    "SLURM_NTASKS": "16",
    "SLURM_STEP_NUM_TASKS": "16",
    "SLURM_PROCID": "11",
    "SLURM_LOCALID": "3",
    "SLURM_STEP_NODELIST": "gpu-[07-08]",
}


def test_nobody_started_it() -> None:
    place = find_place({})
    assert (place.rank, place.local_rank, place.world_size, place.master_addr) == (0, 0, 1, "127.0.0.1")
    assert 0 < place.master_port < 65536


def test_deepspeed_and_torchrun_are_taken_as_they_are() -> None:
    assert find_place(TORCHRUN) == Place(11, 3, 16, "node-1", 29500)


def test_srun() -> None:
    """The master is a function of what all tasks know: catches ranks that wait for different masters."""
    place = find_place(SRUN)
    assert (place.rank, place.local_rank, place.world_size, place.master_addr) == (11, 3, 16, "gpu-07")
    assert FIRST_PORT <= place.master_port < FIRST_PORT + NUM_PORTS
    assert find_place({**SRUN, "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}).master_port == place.master_port


def test_jobs_and_steps_that_share_nodes_have_ports_of_their_own() -> None:
    jobs = [{**SRUN, "SLURM_JOB_ID": str(job), "SLURM_STEP_ID": str(s)} for job in range(4700, 4720) for s in range(3)]
    assert len({find_place(job).master_port for job in jobs}) == len(jobs)


def test_the_user_may_name_the_master_of_an_srun() -> None:
    place = find_place({**SRUN, "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "4000"})
    assert (place.master_addr, place.master_port) == ("10.0.0.1", 4000)


def test_torchrun_inside_of_srun_goes_first() -> None:
    """One launcher a node: its ranks, not Slurm's two tasks."""
    assert find_place({**SRUN, "SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "1", **TORCHRUN}).rank == 11


def test_srun_of_one_task_is_one_rank() -> None:
    """Also inside a larger job: `srun --ntasks=1`, and interactive shells."""
    environment = {**SRUN, "SLURM_STEP_NUM_TASKS": "1", "SLURM_NTASKS": "1", "SLURM_PROCID": "0"}
    assert find_place(environment).world_size == 1


def test_a_place_can_be_found_again() -> None:
    """`enter` writes what it found; under srun the second look must agree."""
    place = find_place(SRUN)
    assert find_place({**SRUN, **place.variables()}) == place


@pytest.mark.parametrize(
    ("environment", "says"),
    [
        ({"RANK": "0", "LOCAL_RANK": "0"}, "RANK is set but WORLD_SIZE, MASTER_ADDR, MASTER_PORT is not"),
        ({**TORCHRUN, "RANK": "16"}, "RANK is 16 but WORLD_SIZE is 16"),
        ({**TORCHRUN, "RANK": "two"}, "RANK is 'two'; expected a number"),
        ({**TORCHRUN, "LOCAL_RANK": "12"}, "LOCAL_RANK is 12 but RANK is 11"),
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE is 2 but RANK is not set"),
        ({**SRUN, "WORLD_SIZE": "8"}, "WORLD_SIZE is 8 but srun started 16 tasks"),
        ({**SRUN, **Place(0, 0, 1, "localhost", 29500).variables()}, "srun started 16 tasks but WORLD_SIZE is 1"),
        ({"SLURM_NTASKS": "16", "SLURM_PROCID": "0"}, "this Slurm job has 16 tasks, but srun did not start"),
        ({"OMPI_COMM_WORLD_SIZE": "4"}, "mpirun started 4 processes"),
        ({**SRUN, "SLURM_STEP_NODELIST": ""}, "set MASTER_ADDR"),
    ],
)
def test_contradictions_are_mistakes(environment: dict[str, str], says: str) -> None:
    """Each would train several jobs of one rank over each other, or wait for ranks that nobody starts."""
    with pytest.raises(UserError, match=says) as caught:
        find_place(environment)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("node-1", "node-1"),
        ("node-1,node-2", "node-1"),
        ("gpu[07-09,12]", "gpu07"),
        ("gpu[12,07-09],cpu1", "gpu12"),
        ("rack[1-2]n[03-04].cluster", "rack1n03.cluster"),
    ],
)
def test_first_host_of_a_node_list(nodes: str, first: str) -> None:
    assert first_host(nodes) == first
