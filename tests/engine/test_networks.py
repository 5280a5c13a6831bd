from __future__ import annotations

import socket
import subprocess
import sys
from pathlib import Path

from tests.ranks import ROOT, free_port, rank_environment

JOIN = """
import sys
import torch.distributed as torch_dist
from ilvr_ds import dist
from ilvr_ds.engine.networks import init_process_group
from deepspeed.utils import groups
assert not {"mlflow", "torch._inductor.lowering"} & set(sys.modules)
import mlflow
assert mlflow.__version__
init_process_group(5400)
engines = groups._get_data_parallel_group()
torch_dist.get_backend = lambda group=None: "nccl"  # on a GPU the host has a group of its own
for group in (torch_dist.group.WORLD, engines, dist._host_group()):
    print(group._get_backend(dist.device()).options._timeout)
"""


def test_a_rank_on_a_cpu_joins_with_patience_in_every_group_and_compiles_nothing(tmp_path: Path) -> None:
    """Catches a job that ends after torch's half an hour, or on GPUs 10 minutes, whatever run.stall_timeout_s says;
    a minute of compiling, for collectives that training never calls; a start that loads mlflow or torch's compiler on
    every rank, or leaves it unusable."""
    environment = {**rank_environment(0, 1, free_port()), "TORCH_EXTENSIONS_DIR": str(tmp_path / "extensions")}
    made = subprocess.run([sys.executable, "-c", JOIN], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert made.returncode == 0, made.stderr
    assert made.stdout.splitlines()[-3:] == ["1:30:00"] * 3
    assert "built successfully" not in made.stdout
    assert not (tmp_path / "extensions").exists()


ALONE = """
import sys
from ilvr_ds import dist
from ilvr_ds.engine.networks import init_process_group
init_process_group(60)
init_process_group(60)
print(dist.world_size(), dist.gather_on_host("here"))
"""


def test_a_job_of_one_needs_no_port_of_its_own(tmp_path: Path) -> None:
    """Catches runs that start together on a machine and end because they chose the same free port, or because
    DeepSpeed's launcher gives each of them 29500."""
    with socket.socket() as taken:
        taken.bind(("0.0.0.0", 0))
        taken.listen()
        environment = rank_environment(0, 1, taken.getsockname()[1])
        made = subprocess.run([sys.executable, "-c", ALONE], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert made.returncode == 0, made.stderr
    assert made.stdout.splitlines()[-1] == "1 ['here']"
