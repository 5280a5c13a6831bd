"""Writing beside the training, a disk that is full, a process that is killed in between."""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler
from safetensors import SafetensorError

from ilvr_ds.checkpoint import writer as checkpoint_writer
from ilvr_ds.checkpoint.files import first_fault, list_checkpoints, saved_state
from ilvr_ds.checkpoint.find import find_checkpoint
from ilvr_ds.checkpoint.writer import CheckpointWriter
from tests.checkpoint.stand_ins import NAMES, Student, recipe, shards


class BigStudent(Student):
    """Several files of a few MB, so that a kill has something to hit."""

    def save_checkpoint(self, folder: str, tag: str, save_latest: bool) -> None:
        super().save_checkpoint(folder, tag, save_latest)
        for part in range(3):
            content = {"weight": torch.full((250_000,), float(self.number)), "part": part}
            self.checkpoint_engine.save(content, f"{folder}/{tag}/part-{part}.pt")


def writer_of(folder: Path, student: Student, background: bool = True, keep_last: int = 2) -> CheckpointWriter:
    return CheckpointWriter(folder, student, NAMES, shards(1.0), keep_last, 0, background)


def state_of(folder: Path, step: int) -> dict[str, Any]:
    loader = {"step": step, "samples per step": 1}
    return {"loader": loader, "recipe": recipe(folder, "auto").to_dict(), "zero_stage": 3, "layout": {}}


class LiveStudent(Student):
    """Hands over a weight that the next step changes in place, and in fp16 the loss scaler itself."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.zeros(4)
        self.scaler = DynamicLossScaler(2.0**16, 2.0, 1000, 1.0, 2, False, dtype=torch.float16)

    def save_checkpoint(self, folder: str, tag: str, save_latest: bool) -> None:
        content = {"weight": self.weight, "groups": [{"again": self.weight}], "loss_scaler": self.scaler}
        self.checkpoint_engine.save(content, f"{folder}/{tag}/weight.pt")


def test_what_training_does_meanwhile_does_not_reach_the_checkpoint(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a writer that keeps references where it should copy."""
    may_write = threading.Event()
    write_all = checkpoint_writer._write_all
    monkeypatch.setattr(checkpoint_writer, "_write_all", lambda *a: (may_write.wait(10), write_all(*a)))
    student = LiveStudent()
    writer = writer_of(folder, student)
    assert writer.start(1, state_of(folder, 1))
    assert not writer.is_written
    student.weight += 7
    student.scaler.cur_iter, student.scaler.cur_scale = 2, 2.0**17
    assert list_checkpoints(folder) == [], "nothing is whole before it is written"
    may_write.set()
    path, _ = writer.finish()
    assert path is not None
    stored = torch.load(path / "student/weight.pt", weights_only=False)
    assert stored["weight"].tolist() == stored["groups"][0]["again"].tolist() == [0.0] * 4
    assert (stored["loss_scaler"].cur_iter, stored["loss_scaler"].cur_scale) == (0, 2.0**16)


def test_without_room_on_the_host_training_waits(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint_writer, "available_host_bytes", lambda: 2_000_000)
    assert not writer_of(folder, BigStudent()).start(1, state_of(folder, 1))
    assert writer_of(folder, Student()).start(1, state_of(folder, 1)), "a small state fits"


def test_ranks_of_a_host_share_its_memory(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches eight ranks that each find room enough for one copy."""
    for hosts, fits in ((("a", "a"), False), (("a", "b"), True)):
        writer = writer_of(folder, BigStudent())
        with monkeypatch.context() as patch:
            room = checkpoint_writer.HEADROOM * 1.5
            patch.setattr(
                checkpoint_writer.dist, "gather_on_host",
                lambda mine, hosts=hosts, room=room: [(host, mine[1], room * mine[1]) for host in hosts],
            )  # fmt: skip
            assert writer.start(1, state_of(folder, 1)) == fits
        writer.finish()


def test_old_checkpoints_are_deleted_but_for_those_that_are_kept(folder: Path) -> None:
    """Catches a writer that does not pass on what to keep."""
    writer = CheckpointWriter(folder, Student(1), NAMES, shards(1.0), 1, 2, True)
    for step in range(1, 6):
        writer.start(step, state_of(folder, step))
        assert writer.finish()[1] is None
    assert [path.name[-1] for path in list_checkpoints(folder)] == ["2", "4", "5"]


@pytest.mark.parametrize("background", [True, False])
def test_a_full_disk_costs_that_checkpoint_alone(folder: Path, background: bool) -> None:
    """/dev/full is a disk without room: the error names the file, what was there stays, the next try works."""
    student = BigStudent(1)
    writer = writer_of(folder, student, background)
    writer.start(1, state_of(folder, 1))
    older, _ = writer.finish()
    make = checkpoint_writer._make_folder

    def full(root: Path, partial: Path) -> str | None:
        error = make(root, partial)
        (partial / "student" / "part-1.pt").symlink_to("/dev/full")
        return error

    checkpoint_writer._make_folder, before = full, make
    try:
        writer.start(2, state_of(folder, 2))
        path, error = writer.finish()
    finally:
        checkpoint_writer._make_folder = before
    assert path is None and error is not None
    assert error.startswith(f"rank 0: {folder}/step-00000002.partial/student/part-1.pt: ")
    assert list_checkpoints(folder) == [older]
    writer.start(3, state_of(folder, 3))
    assert writer.finish()[0] == list_checkpoints(folder)[-1]
    assert not list(folder.glob("*.partial")), "what was left of the failed one is cleared away"


@pytest.mark.parametrize("background", [True, False])
def test_a_teacher_that_cannot_be_written_costs_that_checkpoint_alone(
    folder: Path, background: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a checkpoint without it that is called whole, for which older ones are deleted."""
    writer = writer_of(folder, Student(1), background, keep_last=1)
    writer.start(1, state_of(folder, 1))
    older, _ = writer.finish()

    def full(*_: Any) -> None:
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(checkpoint_writer, "save_file", full)
    writer.start(2, state_of(folder, 2))
    path, error = writer.finish()
    assert path is None and error is not None and "teacher-rank-00000.safetensors: I/O error" in error
    assert list_checkpoints(folder) == [older]


def test_others_may_read_a_checkpoint_as_the_umask_says(folder: Path) -> None:
    """safetensors writes the teacher 0600 whatever the umask is."""
    before = os.umask(0o022)
    try:
        writer = writer_of(folder, BigStudent(), background=True)
        writer.start(1, state_of(folder, 1))
        written, _ = writer.finish()
    finally:
        os.umask(before)
    assert written is not None
    files = [path for path in written.rglob("*") if path.is_file()]
    assert any(file.suffix == ".safetensors" for file in files) and any(file.suffix == ".pt" for file in files)
    assert {oct(file.stat().st_mode & 0o777) for file in files} == {oct(0o644)}


def test_a_file_that_nobody_wrote_is_an_error(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a thread that died of something else."""
    monkeypatch.setattr(checkpoint_writer, "_write_all", lambda *_: None)
    writer = writer_of(folder, Student(1))
    writer.start(1, state_of(folder, 1))
    path, error = writer.finish()
    assert path is None and error == "rank 0: student/number.pt was not written"


def test_an_old_checkpoint_that_cannot_be_deleted_stays(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*_: Any) -> None:
        raise OSError(39, "Directory not empty")

    monkeypatch.setattr(checkpoint_writer, "remove_old", refuse)
    writer = writer_of(folder, Student(1))
    writer.start(1, state_of(folder, 1))
    assert writer.finish()[0] == list_checkpoints(folder)[-1]
    assert "old checkpoints are not deleted: [Errno 39]" in caplog.text


def test_a_folder_that_cannot_be_written_is_an_error_of_that_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    writer = writer_of(tmp_path / "file" / "checkpoints", Student())
    assert not writer.start(1, state_of(tmp_path, 1))
    path, error = writer.finish()
    assert path is None and error is not None and "Not a directory" in error


def save_for_ever(folder: Path, background: bool) -> None:
    """The life of a process that is going to be killed."""
    torch.set_num_threads(1)
    student = BigStudent()
    found = list_checkpoints(folder)
    step = saved_state(found[-1])["step"] if found else 0
    writer = writer_of(folder, student, background)
    while True:
        step += 1
        student.number = step
        writer.start(step, state_of(folder, step))
        writer.finish()


def kill_while_saving(folder: Path, seed: int, times: int) -> int:
    """Kill a saving process `times` times; returns how many of the kills left an unfinished checkpoint behind."""
    random_numbers = random.Random(seed)
    print(f"seed {seed}, {times} kills")
    newest = hits = 0
    for turn in range(times):
        child = os.fork()
        if child == 0:
            save_for_ever(folder, background=turn % 2 == 0)
        time.sleep(random_numbers.uniform(0.02, 0.25))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        hits += bool(list(folder.glob("*.partial")))
        found = list_checkpoints(folder)
        if not found:
            continue
        assert first_fault(found[-1]) is None
        assert find_checkpoint(recipe(folder, "auto")) == found[-1], "what was renamed is intact"
        step = saved_state(found[-1])["step"]
        assert step >= newest, "a checkpoint was lost"
        assert torch.load(found[-1] / "student/part-2.pt")["weight"].unique().tolist() == [step]
        newest = step
    assert newest > 0
    return hits


def test_a_kill_while_saving_leaves_the_newest_whole_checkpoint(folder: Path) -> None:
    assert kill_while_saving(folder, seed=1, times=12) > 0


@pytest.mark.drill
def test_many_kills_while_saving(folder: Path) -> None:
    hits = kill_while_saving(folder, seed=int(os.environ.get("ILVR_DRILL_SEED", "20")), times=300)
    print(f"{hits} of 300 kills hit a checkpoint that was being written")
    assert hits >= 50
