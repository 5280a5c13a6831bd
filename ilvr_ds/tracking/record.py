"""The record of a run: `metrics.jsonl`, one line for each set of metrics or event. Everything else is a copy of it."""

from __future__ import annotations

import json
import logging
import math
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

logger = logging.getLogger("ilvr_ds")


class Record:
    """Appends lines to a JSON Lines file; each is on its way to the disk when the call returns. Any thread may call.

    Metrics: {"step": int, "time": seconds, "metrics": {name: number}}; events: {"event": name, "time": seconds, ...}.
    Numbers that JSON lacks are the strings "nan", "inf" and "-inf".
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        drop_torn_line(path)
        self._file = path.open("a", encoding="utf-8")
        self._lock = threading.Lock()

    def metrics(self, step: int, metrics: Mapping[str, float]) -> None:
        """Append the metrics of a step."""
        plain = {name: value if math.isfinite(value) else str(value) for name, value in metrics.items()}
        self._write({"step": step, "time": time.time(), "metrics": plain})

    def event(self, name: str, **details: Any) -> None:
        """Append an event."""
        self._write({"event": name, "time": time.time(), **details})

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def _write(self, content: dict[str, Any]) -> None:
        with self._lock:
            self._file.write(json.dumps(content) + "\n")
            self._file.flush()


def read_record(path: Path, offset: int = 0) -> Iterator[tuple[dict[str, Any], int]]:
    """Whole lines from byte `offset` on, each with the offset behind it; a line still being written is left out."""
    with path.open("rb") as file:
        file.seek(offset)
        for line in file:
            if not line.endswith(b"\n"):
                return
            offset += len(line)
            yield json.loads(line), offset


def summary_lines(path: Path) -> list[str]:
    """How a run went, from its record: first and last logged training metrics, last evaluation."""
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
    """Cut off a last line that a crash left unfinished, so that the next line starts on its own."""
    if not path.exists():
        return
    data = path.read_bytes()
    whole = data.rfind(b"\n") + 1
    if whole < len(data):
        logger.warning("%s: dropped an unfinished last line of %d bytes", path, len(data) - whole)
        with path.open("r+b") as file:
            file.truncate(whole)
