"""Sets a run's record aside when the run starts over, or goes back to a step before its last recorded one.

`metrics.jsonl`, `mlflow.json` and `pictures` take the first free number: `metrics.1.jsonl` and so on.
"""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

from ilvr_ds.tracking.mlflow_state import PARENT_TAG, WENT_BACK_TAG, CopyState, LeftRun, read_state, write_state
from ilvr_ds.tracking.record import read_record
from ilvr_ds.whole_files import write_whole

logger = logging.getLogger("ilvr_ds")


def set_aside(directory: Path) -> int:
    """Rename record, MLflow state and pictures of an earlier attempt; returns their number."""
    number = 1
    while (directory / f"metrics.{number}.jsonl").exists():
        number += 1
    for name, ending in (("metrics", "jsonl"), ("mlflow", "json")):
        if (directory / f"{name}.{ending}").exists():
            (directory / f"{name}.{ending}").rename(directory / f"{name}.{number}.{ending}")
    if (directory / "pictures").exists():
        (directory / "pictures").rename(directory / f"pictures.{number}")
    return number


def go_back(directory: Path, step: int) -> None:
    """Set the record aside if it goes beyond `step`, and begin a new one with everything up to `step`.

    MLflow cannot delete single points, so this becomes a new run there; the old one is renamed (mlflow_copy.py).
    """
    record, state_file = directory / "metrics.jsonl", directory / "mlflow.json"
    lines = [line for line, _ in read_record(record)] if record.exists() else []
    beyond = next((n for n, line in enumerate(lines) if line.get("step", 0) > step), None)
    if beyond is None:
        return
    # an event without a step belongs to the step before it
    common = [line for n, line in enumerate(lines) if line.get("step", step if n < beyond else step + 1) <= step]
    left = read_state(state_file)
    number = set_aside(directory)
    _copy_pictures(common, directory / f"pictures.{number}", directory / "pictures")
    tags = {PARENT_TAG: left.tags[PARENT_TAG]} if PARENT_TAG in left.tags else {}
    if left.run_id:
        tags[WENT_BACK_TAG] = left.run_id
    write_state(state_file, CopyState(tags=tags, left=LeftRun(left.run_id, step) if left.run_id else None))
    write_whole(record, "".join(json.dumps(line) + "\n" for line in common))
    logger.warning("going back to step %d: what was recorded after it is in metrics.%d.jsonl", step, number)


def _copy_pictures(lines: list[dict[str, Any]], before: Path, now: Path) -> None:
    for line in lines:
        if line.get("event") == "picture" and (before / line["file"]).is_file():
            now.mkdir(exist_ok=True)
            shutil.copy2(before / line["file"], now / line["file"])
