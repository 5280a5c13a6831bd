"""Hosts of a cluster on this machine: Linux namespaces on a bridge, each with its own network, processes and sshd.

A host shares this machine's files, as cluster nodes share a file system, but has its own name, addresses, processes,
/run and /dev/shm. Needs root. Hosts end with the process that made them.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

NETWORK = "10.77.0"
HEAD = "head"
_SSH = """\
Host {hosts}
  User root
  IdentityFile {folder}/key
  StrictHostKeyChecking no
  UserKnownHostsFile /dev/null
  LogLevel ERROR
  BatchMode yes
  ServerAliveInterval 5
  ServerAliveCountMax 3
"""
_SSHD = """\
HostKey {folder}/key
AuthorizedKeysFile {folder}/key.pub
StrictModes no
UsePAM no
PermitRootLogin prohibit-password
PasswordAuthentication no
PidFile /run/sshd.pid
MaxStartups 100
"""
_BOOT = """\
hostname {name}
ip link set lo up
mount -t tmpfs tmpfs /run
mkdir -p -m 755 /run/sshd /run/munge
mount -t tmpfs tmpfs /dev/shm
chmod 1777 /dev/shm
mount --bind {folder}/hosts /etc/hosts
mount --bind {folder}/ssh_config /etc/ssh/ssh_config
"""
_INIT = "while :; do sleep 1000 & wait; done"  # process 1 of a host: adopts orphans and reaps them


class Hosts:
    """`head` and `h1` to `hN`, up when made; `folder` must be empty and short enough for names of sockets."""

    def __init__(self, folder: Path, count: int) -> None:
        self.folder = folder
        self.names = [f"h{number + 1}" for number in range(count)]
        self._inits: dict[str, tuple[subprocess.Popen[bytes], int]] = {}
        addresses = [f"{NETWORK}.1 {HEAD}", *(f"{NETWORK}.{11 + i} {name}" for i, name in enumerate(self.names))]
        (folder / "hosts").write_text("\n".join(["127.0.0.1 localhost", *addresses, ""]))
        (folder / "ssh_config").write_text(_SSH.format(folder=folder, hosts=" ".join([HEAD, *self.names])))
        (folder / "sshd_config").write_text(_SSHD.format(folder=folder))
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", folder / "key"], check=True)
        try:
            self._start_namespaces(HEAD)
            self.run(HEAD, "ip", "link", "add", "br0", "type", "bridge")
            self.run(HEAD, "ip", "addr", "add", f"{NETWORK}.1/24", "dev", "br0")
            self.run(HEAD, "ip", "link", "set", "br0", "up")
            for name in self.names:
                self.boot(name)
        except BaseException:
            self.close()
            raise

    def boot(self, name: str) -> None:
        """Start a host, or start it again after `kill`; returns when ssh reaches it."""
        self._start_namespaces(name)
        head, init = (str(self._inits[host][1]) for host in (HEAD, name))
        number = int(name[1:])
        hardware = f"02:00:00:00:00:{number:02x}"  # the same after a reboot: others remember it
        veth = [
            "ip",
            "link",
            "add",
            "eth0",
            "address",
            hardware,
            "type",
            "veth",
            "peer",
            "name",
            f"v{name}",
            "netns",
            head,
        ]
        subprocess.run(["nsenter", "-t", init, "-n", *veth], check=True)  # `head` is this machine's process number
        self.run(HEAD, "ip", "link", "set", f"v{name}", "master", "br0", "up")
        self.run(name, "ip", "addr", "add", f"{NETWORK}.{10 + number}/24", "dev", "eth0")
        self.run(name, "ip", "link", "set", "eth0", "up")
        self.run(
            name, "/usr/sbin/sshd", "-f", str(self.folder / "sshd_config"), "-E", str(self.folder / f"sshd-{name}")
        )
        deadline = time.monotonic() + 60
        while subprocess.run(self.command(HEAD, "ssh", name, "true"), capture_output=True).returncode:
            assert time.monotonic() < deadline, (self.folder / f"sshd-{name}").read_text()
            time.sleep(0.1)

    def kill(self, name: str) -> None:
        """The death of a host, with everything on it."""
        outer, inner = self._inits.pop(name)
        os.kill(inner, signal.SIGKILL)
        outer.wait()

    def cut(self, name: str) -> None:
        """Pull the plug of its network: nothing arrives, nothing is refused."""
        self.run(HEAD, "ip", "link", "set", f"v{name}", "down")

    def mend(self, name: str) -> None:
        """Undo `cut`."""
        self.run(HEAD, "ip", "link", "set", f"v{name}", "up")

    def close(self) -> None:
        """End all hosts."""
        for name in list(self._inits):
            self.kill(name)

    def command(self, name: str, *words: str) -> list[str]:
        """A command line for this machine which runs `words` on the host, in the same working directory."""
        init = str(self._inits[name][1])
        return ["nsenter", "-t", init, "-n", "-m", "-u", "-i", "-p", f"-w{Path.cwd()}", "--", *words]

    def run(self, name: str, *words: str, timeout_s: float = 60) -> str:
        """What the command printed; it must succeed."""
        done = subprocess.run(self.command(name, *words), capture_output=True, text=True, timeout=timeout_s)
        assert done.returncode == 0, f"{name}: {' '.join(words)}: {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done.stdout

    def processes(self, name: str, text: str) -> list[int]:
        """Numbers, as the host counts them, of the processes on it whose command line holds `text`."""
        listed = self.run(name, "ps", "-eww", "-o", "pid=,args=").splitlines()
        return [int(line.split()[0]) for line in listed if text in line]

    def _start_namespaces(self, name: str) -> None:
        # setpriv: the hosts end with this process, however it ends
        command = ["setpriv", "--pdeathsig", "KILL", "unshare", "--net", "--mount", "--uts", "--ipc", "--pid", "--fork"]
        command += ["--kill-child", "--mount-proc", "--propagation", "private", "bash", "-c", _INIT]
        nothing = subprocess.DEVNULL
        outer = subprocess.Popen(command, stdin=nothing, stdout=nothing, stderr=nothing, start_new_session=True)
        children = Path(f"/proc/{outer.pid}/task/{outer.pid}/children")
        deadline = time.monotonic() + 30
        while not (children.is_file() and children.read_text().strip()):
            assert outer.poll() is None and time.monotonic() < deadline, f"no namespaces for {name}"
            time.sleep(0.02)
        self._inits[name] = (outer, int(children.read_text()))
        while Path(f"/proc/{self._inits[name][1]}/comm").read_text() != "bash\n":  # /proc is mounted by then
            time.sleep(0.02)
        self.run(name, "bash", "-ec", _BOOT.format(name=name, folder=self.folder))


def why_not() -> str | None:
    """What keeps this machine from having such hosts; None: nothing."""
    if os.geteuid() != 0:
        return "needs root"
    tools = ("unshare", "nsenter", "setpriv", "ip", "ps", "sshd", "pdsh", "munged", "slurmctld", "slurmd")
    path = f"{os.environ['PATH']}:/usr/sbin:/sbin"
    if missing := [tool for tool in tools if shutil.which(tool, path=path) is None]:
        return f"needs {', '.join(missing)}: apt-get install slurm-wlm munge openssh-server pdsh iproute2 procps"
    tried = subprocess.run(["unshare", "--net", "--mount", "--uts", "--ipc", "--pid", "--fork", "true"], text=True,
                           capture_output=True)  # fmt: skip
    return f"may not make namespaces ({tried.stderr.strip()})" if tried.returncode else None
