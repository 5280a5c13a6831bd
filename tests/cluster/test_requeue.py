"""What the Slurm scripts do with the exit code of their ranks, where Slurm's commands are stand-ins. With a real Slurm:
test_slurm.py, test_scripts.py."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from tests.ranks import ROOT

SRUN = """#!/bin/sh
warn() {  # as Slurm does; srun then hands it to the ranks
  trap "exit $CODE" USR1
  kill -USR1 $PPID
  /bin/sleep 60 >/dev/null 2>&1 & wait
}
case "$*" in
  *"ilvr-ds $COMMAND"*) echo "$*" >> called; [ "$WARNED" = ranks ] && warn; exit $CODE;;
  *) [ "$WARNED" = before ] && warn; exit 0;;
esac
"""


def submit(
    folder: Path, script: str, code: int, state: str, warned: str = "", **variables: str
) -> tuple[int, list[str]]:
    """The script's exit code, and what it asked of Slurm: its ranks end with `code`, the job is in `state` then; it is
    warned, if at all, while the ranks run or before."""
    commands = {
        "srun": SRUN,
        "squeue": f'#!/bin/sh\necho "squeue $*" >> called\necho {state}\n',
        "scontrol": '#!/bin/sh\necho "scontrol $*" >> called\n',
        "sleep": "#!/bin/sh\n",
    }
    (folder / "bin").mkdir()
    for name, text in commands.items():
        (folder / "bin" / name).write_text(text)
        (folder / "bin" / name).chmod(0o755)
    (folder / "launch").symlink_to(ROOT / "launch")
    part = {"SLURM_ARRAY_TASK_ID": "0", "SLURM_ARRAY_TASK_MAX": "1", "SLURM_ARRAY_TASK_COUNT": "2"}
    environment = {
        **os.environ, "PATH": f"{folder / 'bin'}:{os.environ['PATH']}",
        "CODE": str(code), "COMMAND": script, "WARNED": warned,
        "SLURM_JOB_ID": "7", "SLURM_JOB_NUM_NODES": "1", "SLURM_JOB_NODELIST": "a",
        **(part if script == "encode" else {}), **variables,
    }  # fmt: skip
    command = ["bash", f"launch/slurm/{script}.sbatch", "--words", "of mine"]
    ended = subprocess.run(command, cwd=folder, env=environment, check=False, capture_output=True, text=True)
    called = folder / "called"
    return ended.returncode, called.read_text().splitlines() if called.exists() else []


SCRIPTS = ["train", "evaluate", "encode"]
AGAIN = ["squeue -h -j 7 -o %T", "scontrol requeue 7"]


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("code", [85, 138])
def test_a_job_that_a_signal_stopped_starts_again(script: str, code: int, tmp_path: Path) -> None:
    _, [ranks, *asked] = submit(tmp_path, script, code, "RUNNING")
    assert f"ilvr-ds {script} --words of mine " in ranks and ranks.endswith("0/2" if script == "encode" else "85")
    assert asked == AGAIN


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("code", [85, 138, 143, 137])
def test_a_job_that_was_warned_while_it_started_starts_again(script: str, code: int, tmp_path: Path) -> None:
    """SIGUSR1 kills the first rank, and srun the others before they had it: 143 or 137, the largest code, is srun's."""
    ended, [_, *asked] = submit(tmp_path, script, code, "RUNNING", warned="ranks")
    assert ended == code and asked == AGAIN


@pytest.mark.parametrize("script", ["train", "evaluate"])
def test_a_job_that_was_warned_before_its_ranks_starts_none(script: str, tmp_path: Path) -> None:
    assert submit(tmp_path, script, 138, "RUNNING", warned="before") == (138, AGAIN)


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("code", [0, 1, 2])
def test_a_warned_job_that_ended_by_itself_does_not(script: str, code: int, tmp_path: Path) -> None:
    ended, asked = submit(tmp_path, script, code, "RUNNING", warned="ranks")
    assert ended == code and not any("requeue" in line for line in asked)


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize(
    ("code", "state"), [(0, "RUNNING"), (1, "RUNNING"), (2, "RUNNING"), (143, "RUNNING"), (85, "COMPLETING")]
)
def test_a_job_that_ended_otherwise_does_not(script: str, code: int, state: str, tmp_path: Path) -> None:
    """By itself, by a mistake, or by scancel, after which its ranks end as after any signal."""
    ended, asked = submit(tmp_path, script, code, state)
    assert ended == code and not any("requeue" in line for line in asked)


def test_of_an_array_the_job_alone_starts_again(tmp_path: Path) -> None:
    _, asked = submit(tmp_path, "evaluate", 85, "RUNNING", SLURM_ARRAY_JOB_ID="7", SLURM_ARRAY_TASK_ID="3")
    assert asked[1:] == ["squeue -h -j 7_3 -o %T", "scontrol requeue 7_3"]
