"""The best checkpoint of a run: `best.json` beside the checkpoints names its step, and old ones are deleted around it.

{"metric": "eval/ce", "value": 1.25, "step": 400, "samples": "what was evaluated on"}
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ilvr_ds.checkpoint.files import STATE_FILE, checkpoint_name
from ilvr_ds.errors import UserError

BEST_FILE = "best.json"


def read_best(folder: Path) -> dict[str, Any] | None:
    """What `best.json` of the folder of checkpoints says; None where none was kept. Raises UserError if damaged."""
    file = folder / BEST_FILE
    try:
        content: dict[str, Any] = json.loads(file.read_text())
        best = {"metric": str(content["metric"]), "value": float(content["value"]), "step": int(content["step"])}
        return best | ({"samples": str(content["samples"])} if "samples" in content else {})
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{file}: cannot be read ({error}); delete it") from error


def best_checkpoint(folder: Path) -> Path | None:
    """The best complete checkpoint, if one is kept and still there."""
    best = read_best(folder)
    path = folder / checkpoint_name(best["step"]) if best else None
    return path if path is not None and (path / STATE_FILE).is_file() else None


def write_best(folder: Path, best: dict[str, Any]) -> None:
    """Name the best checkpoint, which must be there (main rank only). Raises OSError."""
    new = folder / f"{BEST_FILE}.new"  # not .partial: that is what killed saves leave
    new.write_text(json.dumps(best) + "\n")
    new.replace(folder / BEST_FILE)


def name_again(folder: Path, best: dict[str, Any]) -> None:
    """Name a best checkpoint that is there and not named (main rank only): the run went back to it or behind it, or was
    killed before it named it. Raises UserError."""
    if read_best(folder) != best and (folder / checkpoint_name(best["step"]) / STATE_FILE).is_file():
        try:
            write_best(folder, best)
        except OSError as error:
            raise UserError(f"{folder / BEST_FILE}: cannot be written ({error.strerror})") from error
