"""Slurm on the hosts of `hosts.py`: the controller on `head`, on each `hN` a node that claims 128 cores and 8 GPUs."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from tests.cluster.hosts import HEAD, Hosts

_CONFIG = """\
ClusterName=test
SlurmctldHost={head}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket=/run/munge/socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile=/run/slurmctld.pid
SlurmdPidFile=/run/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
MpiDefault=none
PropagateResourceLimits=NONE
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerType=sched/backfill
SchedulerParameters=bf_interval=2,batch_sched_delay=0,sched_interval=2
JobCompType=jobcomp/filetxt
JobCompLoc={folder}/completed
ReturnToService=2
SlurmdTimeout={timeout_s}
KillWait=5
MinJobAge=3600
GresTypes=gpu
SlurmdParameters=config_overrides
SlurmctldParameters=preempt_send_user_signal
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
NodeName={nodes} CPUs=128 RealMemory=1000000 Gres=gpu:8
PartitionName=low  Nodes=ALL Default=YES MaxTime=INFINITE PriorityTier=1 PreemptMode=REQUEUE GraceTime=60
PartitionName=high Nodes=ALL MaxTime=INFINITE PriorityTier=10 PreemptMode=OFF
"""


class Slurm:
    """Up when made; ends with the hosts. `environment` belongs to every command that talks to it."""

    def __init__(self, hosts: Hosts) -> None:
        self.hosts, self.folder = hosts, hosts.folder / "slurm"
        (self.folder / "state").mkdir(parents=True)
        self._configure(timeout_s=10)
        for number in range(8):
            (self.folder / f"gpu{number}").touch()  # stands for /dev/nvidia0 and so on
        (self.folder / "gres.conf").write_text(f"Name=gpu File={self.folder}/gpu[0-7]\n")
        key = self.folder / "munge.key"
        key.touch(mode=0o600)
        key.write_bytes(bytes(range(256)) * 4)
        self.environment = {"SLURM_CONF": str(self.folder / "slurm.conf")}
        self._munge(HEAD)
        self.run("slurmctld", "-c")
        for name in hosts.names:
            (self.folder / f"spool-{name}").mkdir()
            self.boot(name)
        self.wait_for_nodes()

    def boot(self, name: str) -> None:
        """Start the node's services, or start them again after its host was killed."""
        self._munge(name)
        self.hosts.run(name, "env", *self._settings(), "slurmd", "-b")

    def rejoin(self) -> None:
        """Bring back nodes that the controller gave up while their link was cut."""
        for name in self.hosts.names:
            for process in self.hosts.processes(name, "slurmd -b"):
                self.hosts.run(name, "kill", str(process))
            self.hosts.run(name, "env", *self._settings(), "slurmd", "-b")
        self.wait_for_nodes()

    @contextmanager
    def patience(self, timeout_s: int) -> Iterator[None]:
        """Meanwhile a node is declared dead only after a silence of `timeout_s`; clusters usually wait for 300 s."""
        self._configure(timeout_s)
        self.run("scontrol", "reconfigure")
        try:
            yield
        finally:
            self._configure(timeout_s=10)
            self.run("scontrol", "reconfigure")

    def run(self, *words: str, timeout_s: float = 60) -> str:
        """A command on the head, such as sbatch; returns what it printed."""
        return self.hosts.run(HEAD, "env", *self._settings(), *words, timeout_s=timeout_s)

    def states(self, job: str) -> list[str]:
        """PENDING, RUNNING, COMPLETED..., of each job of an array."""
        return self._fields(job, "JobState")

    def field(self, job: str, name: str) -> str:
        """A field of `scontrol show job`."""
        return self._fields(job, name)[0]

    def fields(self, job: str, *names: str) -> tuple[str, ...]:
        """Several fields as they were at one moment: read one after the other, they may belong to two starts."""
        found = dict(word.partition("=")[::2] for word in self.run("scontrol", "show", "job", job).split())
        return tuple(found[name] for name in names)

    def _fields(self, job: str, name: str) -> list[str]:
        words = self.run("scontrol", "show", "job", job).split()
        return [word.partition("=")[2] for word in words if word.startswith(f"{name}=")]

    def wait_for_nodes(self) -> None:
        """Return when every node can take jobs."""
        deadline = time.monotonic() + 120
        while len(self.run("sinfo", "-h", "-N", "-t", "idle", "-p", "low", "-o", "%N").split()) < len(self.hosts.names):
            assert time.monotonic() < deadline, self.run("sinfo", "-R") + (self.folder / "slurmctld.log").read_text()
            time.sleep(0.2)

    def _configure(self, timeout_s: int) -> None:
        names = ",".join(self.hosts.names)
        config = _CONFIG.format(head=HEAD, folder=self.folder, nodes=names, timeout_s=timeout_s)
        (self.folder / "slurm.conf").write_text(config)

    def _munge(self, name: str) -> None:
        files = {"socket": "socket", "pid-file": "pid", "log-file": "log", "seed-file": "seed"}
        options = [f"--{option}=/run/munge/{file}" for option, file in files.items()]
        self.hosts.run(name, "munged", f"--key-file={self.folder / 'munge.key'}", *options)

    def _settings(self) -> list[str]:
        return [f"{key}={value}" for key, value in self.environment.items()]
