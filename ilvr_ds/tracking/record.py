"""The record of a run: `metrics.jsonl`, one line per set of metrics or event. Everything else copies from it."""

from __future__ import annotations

import json
import logging
import math
import os
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from ilvr_ds.whole_files import cut_torn_line

logger = logging.getLogger("ilvr_ds")


class Lines:
    """Appends to a JSON Lines file, unbuffered. Any thread may call.

    A disk that is full or away costs nothing but memory: lines wait and are retried with the next one.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._waiting: list[bytes] = []
        self._lock = threading.Lock()
        drop_torn_line(path)

    def append(self, content: dict[str, Any]) -> None:
        """Write a line after those that wait."""
        with self._lock:
            self._try([*self._waiting, _line(content)])

    def retry(self) -> None:
        """Write the lines that wait, if any."""
        with self._lock:
            if self._waiting:
                self._try(self._waiting)

    def close(self) -> None:
        """Try a last time; the log counts what could not be written."""
        self.retry()
        if self._waiting:
            logger.error("%s: %d lines could not be written and are lost", self.path, len(self._waiting))

    def _try(self, lines: list[bytes]) -> None:
        """Write all lines or none."""
        waited = len(self._waiting)
        try:
            _append(self.path, b"".join(lines))
        except OSError as error:
            if not waited:
                reason = error.strerror or error
                logger.warning("%s: %s; training goes on, lines wait and are retried", self.path, reason)
            self._waiting = lines
            return
        self._waiting = []
        if waited:
            logger.warning("%s: %d waiting lines are written", self.path, waited)
            self._after_waiting(waited)

    def _after_waiting(self, lines: int) -> None:
        """Called when `lines` lines were written late."""


class Record(Lines):
    """The lines of a run.

    Metrics: {"step": int, "time": seconds, "metrics": {name: number}}; events: {"event": name, "time": seconds, ...}.
    Numbers that JSON lacks are the strings "nan", "inf" and "-inf".
    """

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        path.touch()  # a reader may come before the first line

    def metrics(self, step: int, metrics: Mapping[str, float]) -> None:
        """Append the metrics of a step."""
        plain = {name: value if math.isfinite(value) else str(value) for name, value in metrics.items()}
        self.append({"step": step, "time": time.time(), "metrics": plain})

    def event(self, name: str, **details: Any) -> None:
        """Append an event."""
        self.append({"event": name, "time": time.time(), **details})

    def _after_waiting(self, lines: int) -> None:
        self._try([_line({"event": "record_waited", "time": time.time(), "lines": lines})])


def _line(content: dict[str, Any]) -> bytes:
    return json.dumps(content).encode() + b"\n"


def _append(path: Path, data: bytes) -> None:
    """Add whole lines or nothing; raises OSError. Opens the file each time: a disk that was away leaves no dead handle,
    and some file systems report a full disk only at close."""
    before = path.stat().st_size if path.exists() else 0
    try:
        with path.open("ab", buffering=0) as file:
            while data:  # a nearly full disk takes a part
                data = data[file.write(data) :]
    except OSError:
        with suppress(OSError):  # if this fails, the next start drops the torn line
            os.truncate(path, before)
        raise


def read_record(path: Path, offset: int = 0) -> Iterator[tuple[dict[str, Any], int]]:
    """Complete lines from byte `offset` on, each with the offset after it; a line still being written is left out."""
    with path.open("rb") as file:
        file.seek(offset)
        for line in file:
            if not line.endswith(b"\n"):
                return
            offset += len(line)
            yield json.loads(line), offset


def summary_lines(path: Path) -> list[str]:
    """A run in a few lines, from its record: first and last training metrics, last evaluation."""
    first: dict[str, tuple[int, float]] = {}
    last: dict[str, tuple[int, float]] = {}
    for line, _ in read_record(path):
        for name, value in line.get("metrics", {}).items():
            first.setdefault(name, (line["step"], float(value)))
            last[name] = (line["step"], float(value))
    lines = []
    for name in ("loss/ce", "loss/alignment", "loss/contrastive", "teacher/drift"):
        if name in last:
            (start, before), (end, after) = first[name], last[name]
            lines.append(f"{name:<22} {before:.4f} (step {start}) -> {after:.4f} (step {end})")
    for name in ("eval/ce", "eval/answer_accuracy"):
        if name in last:
            lines.append(f"{name:<22} {last[name][1]:.4f} on held-out samples")
    return lines


def drop_torn_line(path: Path) -> None:
    """Cut off a last line that a crash left unfinished, so that the next one starts on a new line."""
    if path.exists() and (dropped := cut_torn_line(path)):
        logger.warning("%s: dropped an unfinished last line of %d bytes", path, dropped)
