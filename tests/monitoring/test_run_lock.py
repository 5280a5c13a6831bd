"""One process trains a run; the lock of a dead one holds nobody up."""

from __future__ import annotations

import dataclasses
import json
import os
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from ilvr_ds.errors import UserError
from ilvr_ds.monitoring import run_lock as module
from ilvr_ds.monitoring.run_lock import STALE_S, run_lock
from ilvr_ds.owner import Owner
from tests.ranks import run_ranks
from tests.recipes import RECIPE

HOLDER = """
import sys, time
from pathlib import Path
from ilvr_ds.monitoring.run_lock import run_lock
with run_lock(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""


def holder(folder: Path) -> subprocess.Popen[str]:
    """Another process that trains."""
    process = subprocess.Popen([sys.executable, "-c", HOLDER, str(folder)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    return process


def refusal(folder: Path) -> str:
    try:
        with run_lock(folder):
            return ""
    except UserError as error:
        return str(error)


def write(folder: Path, owner: Owner, silent_s: float = 0.0) -> None:
    (folder / "lock.json").write_text(json.dumps(dataclasses.asdict(owner)))
    os.utime(folder / "lock.json", (time.time() - silent_s,) * 2)


@pytest.fixture
def elsewhere() -> Owner:
    """An owner on another host."""
    return dataclasses.replace(Owner(), host="node-7", machine="another", process=1, job=None)


def test_a_start_that_writes_nothing_leaves_no_folder(tmp_path: Path) -> None:
    """Catches the empty folder of a run whose recipe is refused; what somebody else has put there stays."""
    with run_lock(tmp_path / "runs/one"):
        assert (tmp_path / "runs/one/lock.json").exists()
    assert not (tmp_path / "runs").exists()
    with run_lock(tmp_path / "runs/one"):
        (tmp_path / "runs/one/metrics.jsonl").touch()
        (tmp_path / "runs/other").mkdir()
    assert [path.name for path in (tmp_path / "runs/one").iterdir()] == ["metrics.jsonl"]


def test_a_second_start_is_refused_by_name_and_a_killed_owner_is_not_waited_for(tmp_path: Path) -> None:
    """Catches two processes that write one record and one checkpoint, and a run that nobody can start again."""
    process = holder(tmp_path)
    said = refusal(tmp_path)
    assert f"run.name: {tmp_path} is being trained by process {process.pid} on {socket.gethostname()}, since 20" in said
    assert said.endswith("; wait for its end, or take another run.name")
    assert [path.name for path in tmp_path.iterdir()] == ["lock.json"], "the refused start leaves nothing"
    process.kill()  # not waited for: its entry in the table of processes stays
    deadline = time.monotonic() + 60
    while refusal(tmp_path) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert refusal(tmp_path) == ""
    process.wait()
    assert not list(tmp_path.iterdir()), "it is released"


def test_a_number_that_another_process_has_now_is_no_owner(tmp_path: Path) -> None:
    write(tmp_path, dataclasses.replace(Owner(), started=1))
    assert refusal(tmp_path) == ""


def test_an_owner_on_another_host_is_believed_until_it_is_silent(tmp_path: Path, elsewhere: Owner) -> None:
    write(tmp_path, elsewhere, silent_s=STALE_S - 20)
    said = refusal(tmp_path)
    assert "process 1 on node-7" in said and f"if it is gone, start again in 20 s, or delete {tmp_path}" in said
    write(tmp_path, elsewhere, silent_s=STALE_S + 1)
    assert refusal(tmp_path) == ""


@pytest.mark.parametrize(("job", "start", "refused"), [("12", 1, False), ("12", 0, True), ("13", 1, True)])
def test_a_requeue_on_another_host_does_not_wait(
    tmp_path: Path, elsewhere: Owner, monkeypatch: pytest.MonkeyPatch, job: str, start: int, refused: bool
) -> None:
    """Slurm starts a job again when nothing is left of it; two starts within one allocation are two."""
    monkeypatch.setenv("SLURM_JOB_ID", job)
    monkeypatch.setenv("SLURM_RESTART_COUNT", str(start))
    write(tmp_path, dataclasses.replace(elsewhere, job="12", start=0))
    assert bool(refusal(tmp_path)) == refused


def test_a_lock_that_names_nobody_is_believed_until_it_is_old(tmp_path: Path) -> None:
    """A process that was killed while it wrote, or is about to."""
    (tmp_path / "lock.json").write_text("")
    assert "a process that has not said its name" in refusal(tmp_path)
    os.utime(tmp_path / "lock.json", (time.time() - STALE_S - 1,) * 2)
    assert refusal(tmp_path) == ""


def test_of_many_that_take_over_at_once_one_has_it(
    tmp_path: Path, elsewhere: Owner, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches the second of two that saw the same dead owner."""
    everyone_saw = threading.Barrier(8)
    replace = module._replace

    def together(path: Path, mine: Owner) -> None:
        everyone_saw.wait()
        replace(path, mine)

    monkeypatch.setattr(module, "_replace", together)
    write(tmp_path, elsewhere, silent_s=STALE_S + 1)
    taken: list[Owner] = []

    def take() -> None:
        try:
            taken.append(module._take(tmp_path))
        except UserError as error:
            assert "is being trained by process" in str(error)

    threads = [threading.Thread(target=take) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(taken) == 1


def test_the_owner_touches_its_lock_and_leaves_when_another_has_it(tmp_path: Path, elsewhere: Owner) -> None:
    """Catches an owner that was stopped for minutes, and writes on beside the one that took over."""
    code = HOLDER.replace(
        "with run_lock", "from ilvr_ds.monitoring import run_lock as m\nm.BEAT_S = 0.2\nwith run_lock"
    )
    process = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    os.utime(tmp_path / "lock.json", (0, 0))
    deadline = time.monotonic() + 60
    while (tmp_path / "lock.json").stat().st_mtime == 0 and time.monotonic() < deadline:
        time.sleep(0.05)
    assert (tmp_path / "lock.json").stat().st_mtime > 0
    assert process.poll() is None
    write(tmp_path, elsewhere)
    assert process.wait(60) == 1
    assert json.loads((tmp_path / "lock.json").read_text())["host"] == "node-7"


def test_a_folder_that_cannot_be_written_is_a_mistake(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert refusal(tmp_path / "file/run").startswith("run.output_dir: cannot write to ")


def test_all_ranks_are_refused_before_anything_is_written(tmp_path: Path, elsewhere: Owner, demo_folder: Path) -> None:
    """Catches ranks that wait in a collective for a main rank that has left."""
    (tmp_path / "demo").mkdir()
    write(tmp_path / "demo", elsewhere)
    data = [f"data.shards={demo_folder / 'train'}", f"data.eval_shards={demo_folder / 'held_out'}"]
    arguments = {"recipe": RECIPE, "overrides": [*data, f"run.output_dir={tmp_path}"]}
    said = run_ranks("tests.distributed.workers_run:refused", 2, tmp_path / "ranks", **arguments)
    assert said[0] == said[1] and "process 1 on node-7" in said[0]
    assert [path.name for path in (tmp_path / "demo").iterdir()] == ["lock.json"]
