"""Checkpoints: everything that a run needs to go on as if it had never stopped.

    checkpoints/step-00000100/
      state.json                  step, loader position, recipe, MLflow run, world size, ZeRO stage and layout under it,
                                  hub's commit of the base and fingerprints of what of it is not here, size and CRC-32
                                  of each file
      student/                    DeepSpeed's files: weights, optimizer, loss scale
      teacher-rank-00000.safetensors, rng-rank-00000.pt

This file names them, lists and removes checkpoints, and says whether one is intact; capture.py and writer.py write
them, find.py chooses one, compatible.py says whether a job can go on from it, load.py and reshard.py load it, and
layout.py says what decides where the elements of weights lie.
"""

from __future__ import annotations

import json
import re
import shutil
import zlib
from pathlib import Path
from typing import Any

from ilvr_ds import dist
from ilvr_ds.errors import UserError

CHUNK = 2**24
"""Bytes that are summed at a time."""
_NAME = re.compile(r"step-(\d{8})")
_ASIDE = re.compile(r"step-(\d{8})\.aside-\d+")
STATE_FILE = "state.json"
_RENAMED = {("data", "shuffle_window"): "shuffle_buffer"}
"""Keys of the recipe by the names that older checkpoints have for them."""


def checkpoint_name(step: int) -> str:
    """Folder name of the checkpoint after `step` optimizer steps."""
    return f"step-{step:08d}"


def list_checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    if not folder.is_dir():
        return []
    return sorted(p for p in folder.iterdir() if _NAME.fullmatch(p.name) and (p / STATE_FILE).is_file())


def first_fault(path: Path) -> str | None:
    """What is wrong with the first damaged file of a checkpoint, or None (collective: ranks share the reading)."""
    fault, files = None, []
    try:
        state = _read_state(path)
        files = sorted(state["files"].items())
        if state.pop("checksum") != checksum_of(state):
            fault = f"{path / STATE_FILE}: damaged (its checksum is another)"
    except (OSError, ValueError, KeyError, AttributeError) as error:  # perhaps on this rank alone
        fault = f"{path / STATE_FILE}: damaged ({type(error).__name__})"
    for name, (size, checksum) in files[dist.rank() :: dist.world_size()]:
        fault = fault or _fault(path / name, size, checksum)
    return next((found for found in dist.gather_on_host(fault) if found), None)


def newest_intact(candidates: list[Path]) -> Path:
    """The last of these checkpoints whose every file is intact (collective); warns of those after it.

    Raises UserError where none is.
    """
    fault = None
    for path in reversed(candidates):
        if fault:
            dist.warn("%s; looking at the checkpoint before it", fault)
        fault = first_fault(path)
        if fault is None:
            return path
    raise UserError(f"{fault}; {'no other is intact' if len(candidates) > 1 else 'take another checkpoint'}")


def _fault(file: Path, size: int, checksum: int) -> str | None:
    try:
        if file.stat().st_size != size:
            return f"{file}: damaged ({file.stat().st_size} bytes instead of {size})"
        if size_and_checksum(file) != (size, checksum):
            return f"{file}: damaged (its checksum is another)"
    except OSError as error:
        return f"{file}: {error.strerror}"
    return None


def checksum_of(state: dict[str, Any]) -> int:
    """CRC-32 of a `state.json` without its checksum."""
    return zlib.crc32(json.dumps(state, sort_keys=True).encode())


def size_and_checksum(file: Path) -> tuple[int, int]:
    """Size in bytes and CRC-32 of a file."""
    size = checksum = 0
    with file.open("rb") as stream:
        while chunk := stream.read(CHUNK):
            size += len(chunk)
            checksum = zlib.crc32(chunk, checksum)
    return size, checksum


def saved_state(path: Path) -> dict[str, Any]:
    """What `state.json` of a checkpoint says; renamed keys of the recipe have today's names."""
    state = _read_state(path)
    for (section, old), new in _RENAMED.items():
        loader, keys = state.get("loader", {}), state.get("recipe", {}).get(section, {})
        if old in keys:
            keys[new] = keys.pop(old)
        if f"{section}.{old}" in loader:
            loader[f"{section}.{new}"] = loader.pop(f"{section}.{old}")
    return state


def _read_state(path: Path) -> dict[str, Any]:
    state: dict[str, Any] = json.loads((path / STATE_FILE).read_text())
    return state


def remove_old(folder: Path, keep_last: int, keep_every: int = 0, best: Path | None = None) -> list[Path]:
    """Delete complete checkpoints (main rank only): all but the newest `keep_last` (0 keeps all), the `best` and those
    whose step is a multiple of `keep_every`; and those set aside that the run has come as far as again. Returns what
    was deleted."""
    found = list_checkpoints(folder)
    if not keep_last or not found:
        return []
    old = [path for path in found[:-keep_last] if not keep_every or int(path.name.removeprefix("step-")) % keep_every]
    old = [path for path in old if path != best]
    reached = int(found[-1].name.removeprefix("step-"))
    aside = [(path, _ASIDE.fullmatch(path.name)) for path in sorted(folder.iterdir())]
    old += [path for path, name in aside if name and int(name[1]) <= reached]
    for path in old:
        partial = path.with_name(f"{path.name}.partial")  # a half-deleted checkpoint is never taken for a whole one,
        path.rename(partial)  # and the next save deletes what is left of it
        shutil.rmtree(partial)
    return old


def teacher_file(rank: int) -> str:
    """Name of a rank's file of the teacher's averages."""
    return f"teacher-rank-{rank:05d}.safetensors"
