"""Writing a checkpoint, beside the training where memory allows.

DeepSpeed and the teacher hand over their state; a thread, or the rank itself, then writes this rank's files, syncs them
to disk and checksums them, under a name that ends in `.partial`. When every rank has finished, the main rank adds
`state.json`, which lists every file with its size and CRC-32, and renames the folder: a folder with a plain name is
whole, whenever the job was killed.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import socket
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from threading import Thread
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file

from ilvr_ds import dist
from ilvr_ds.checkpoint.best import best_checkpoint
from ilvr_ds.checkpoint.capture import TorchFile, copy_to_host, student_files
from ilvr_ds.checkpoint.files import (
    STATE_FILE,
    checkpoint_name,
    checksum_of,
    remove_old,
    size_and_checksum,
    teacher_file,
)
from ilvr_ds.checkpoint.load import random_state
from ilvr_ds.distill.ema import MomentumShards
from ilvr_ds.distill.teacher import MomentumTeacher
from ilvr_ds.errors import UserError, first_line
from ilvr_ds.file_modes import follow_umask
from ilvr_ds.monitoring.host_memory import available_host_bytes

logger = logging.getLogger("ilvr_ds")
HEADROOM = 1.25
"""A copy of the state is taken only where this many times its size is free on the host."""

Write = Callable[[Path], None]


@dataclass
class _Saving:
    """One checkpoint on its way to disk, on this rank."""

    step: int
    state: dict[str, Any]
    writes: dict[str, Write]
    """File name within the checkpoint -> what writes it; only files that are not written yet."""
    sums: dict[str, list[int]] = field(default_factory=dict)
    """File name -> size in bytes and CRC-32."""
    error: str | None = None
    thread: Thread | None = None


class CheckpointWriter:
    """Saves checkpoints of one run below `folder`.

    student: DeepSpeed engine. teacher: the momentum averages of the weights `names`, or None where there is no teacher.
    Calls are collective. A checkpoint that cannot be written costs the run nothing else: `finish` says so.
    """

    def __init__(
        self,
        folder: Path,
        student: Any,
        names: list[str],
        teacher: MomentumTeacher | MomentumShards | None,
        keep_last: int,
        keep_every: int,
        beside_training: bool,
    ) -> None:
        self.folder = folder
        self.student = student
        self.names = names
        self.teacher = teacher
        self.keep_last, self.keep_every = keep_last, keep_every
        self.beside_training = beside_training
        self._saving: _Saving | None = None

    @property
    def is_written(self) -> bool:
        """Whether a started checkpoint waits on this rank to be finished; asks nobody else."""
        return self._saving is not None and (self._saving.thread is None or not self._saving.thread.is_alive())

    def start(self, step: int, state: dict[str, Any]) -> bool:
        """Begin a checkpoint after `step` optimizer steps; `state` must be JSON. The one before must be finished.

        Returns whether it goes on beside the training; else everything is written.
        """
        partial = self._partial(step)
        error = dist.decided_by_main(lambda: _make_folder(self.folder, partial))
        saving = _Saving(step, state, self._collect())
        self._saving = saving
        if error:
            saving.error = error
            return False
        copied = self.beside_training and self._copy(saving)
        if copied:
            saving.thread = Thread(target=_write_all, args=(saving, partial), name="checkpoint", daemon=True)
            saving.thread.start()
        else:
            _write_all(saving, partial)
        return copied

    def finish(self) -> tuple[Path | None, str | None]:
        """Wait for the started checkpoint, make it whole, delete old ones.

        Returns its folder, or None and what went wrong on which rank; (None, None) where nothing was started.
        """
        saving, self._saving = self._saving, None
        if saving is None:
            return None, None
        if saving.thread is not None:
            saving.thread.join()
        error = saving.error or next((f"{name} was not written" for name in saving.writes), None)
        parts = dist.gather_on_host((saving.sums, error))
        errors = [f"rank {rank}: {error}" for rank, (_, error) in enumerate(parts) if error]
        if errors:
            if dist.is_main():  # it may have filled the disk
                shutil.rmtree(self._partial(saving.step), ignore_errors=True)
            return None, "; ".join(errors)
        files = {name: sums for part, _ in parts for name, sums in part.items()}
        content = {"step": saving.step, "world_size": dist.world_size(), **saving.state, "files": files}
        partial, final = self._partial(saving.step), self.folder / checkpoint_name(saving.step)
        content = json.loads(json.dumps(content))  # as it will be read
        content["checksum"] = checksum_of(content)
        error = dist.decided_by_main(lambda: _publish(partial, final, content))
        if error:
            return None, f"rank 0: {error}"
        if dist.is_main():
            try:
                remove_old(self.folder, self.keep_last, self.keep_every, best_checkpoint(self.folder))
            except (OSError, UserError) as problem:
                logger.warning("%s: old checkpoints are not deleted: %s", self.folder, first_line(problem))
        return final, None

    def _partial(self, step: int) -> Path:
        return self.folder / (checkpoint_name(step) + ".partial")

    def _collect(self) -> dict[str, Write]:
        """This rank's files and how to write them, from live state."""
        writes: dict[str, Write] = {}
        for name, content in student_files(self.student).items():
            writes[f"student/{name}"] = TorchFile(content)
        if self.teacher is not None:
            tensors = dict(zip(self.names, self.teacher.state(), strict=True))  # copies, on the host
            writes[teacher_file(dist.rank())] = lambda path: save_file(tensors, path)
        writes[f"rng-rank-{dist.rank():05d}.pt"] = TorchFile(random_state())
        return writes

    def _copy(self, saving: _Saving) -> bool:
        """Replace live tensors by copies on the host; False, on all ranks, where some host has too little memory."""
        files = [write for write in saving.writes.values() if isinstance(write, TorchFile)]
        mine = (socket.gethostname(), sum(file.size() for file in files), available_host_bytes())
        everyone = dist.gather_on_host(mine)
        for host, _, free in everyone:
            if HEADROOM * sum(size for other, size, _ in everyone if other == host) > free:
                dist.warn("%s has too little free memory to save beside the training, which waits for this one", host)
                return False
        for file in files:
            file.content = copy_to_host(file.content)
        return True


def _write_all(saving: _Saving, partial: Path) -> None:
    """Write this rank's files, sync them to disk and checksum them; `finish` tells all ranks of an error."""
    for name in list(saving.writes):
        path = partial / name
        try:
            saving.writes[name](path)
            follow_umask(path)
            _sync(path)
            saving.sums[name] = list(size_and_checksum(path))
        except (OSError, RuntimeError, SafetensorError) as error:  # what torch and safetensors call a full disk
            saving.error = f"{path}: {first_line(error)}"
            return
        del saving.writes[name]  # and its copies' memory


def _sync(path: Path) -> None:
    """Bring a file, or a folder's entries, to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _make_folder(folder: Path, partial: Path) -> str | None:
    """Delete what killed saves left, and make the folder of a new one."""
    try:
        for rest in folder.glob("*.partial"):
            shutil.rmtree(rest)
        final = folder / partial.name.removesuffix(".partial")
        if final.is_dir() and not (final / STATE_FILE).is_file():  # half deleted, by an older version or by hand
            shutil.rmtree(final)
        (partial / "student").mkdir(parents=True)
    except OSError as error:
        return f"{partial}: {first_line(error)}"
    return None


def _publish(partial: Path, final: Path, content: dict[str, Any]) -> str | None:
    """Add `state.json` and give the checkpoint its name."""
    try:
        with (partial / STATE_FILE).open("w") as file:
            json.dump(content, file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        for folder in (partial / "student", partial):
            _sync(folder)
        partial.rename(final)
        _sync(final.parent)
    except OSError as error:
        return f"{final}: {first_line(error)}"
    return None
