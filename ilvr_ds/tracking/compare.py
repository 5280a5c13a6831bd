"""Compares runs by their own records: settings that differ, last step, last metrics."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ilvr_ds.errors import UserError
from ilvr_ds.tracking.record import read_record

HIDDEN = ("run.name", "run.output_dir")
"""Settings that differ between any two runs and explain nothing."""
SHOWN = (
    "loss/",
    "eval/",
    "train/",
    "teacher/drift",
    "select/",
    "speed/tokens_per_s",
    "speed/mfu",
    "memory/",
    "data/skipped",
)
"""Metrics to compare, by prefix."""


def compare(folders: list[Path]) -> list[str]:
    """A table with one column per run; raises UserError for a folder that is not a run's."""
    runs = [_Run(folder) for folder in folders]
    names = _names(runs)
    keys = sorted({key for run in runs for key in run.settings} - set(HIDDEN))
    settings = [[key, *(_text(run.settings.get(key)) for run in runs)] for key in keys]
    differing = [row for row in settings if len(set(row[1:])) > 1]
    metrics = sorted({name for run in runs for name in run.metrics if name.startswith(SHOWN)}, key=_order)
    rows = [["step", *(str(run.step) for run in runs)], ["ended", *(run.status for run in runs)]]
    rows += [[name, *(_number(run.metrics.get(name)) for run in runs)] for name in metrics]
    header = ["", *names]
    widths = [max(len(row[column]) for row in [header, *differing, *rows]) for column in range(len(header))]
    lines = [_line(header, widths), "settings that differ" if differing else "settings: all equal"]
    lines += [_line(row, widths) for row in differing]
    return [*lines, "last metrics", *(_line(row, widths) for row in rows)]


class _Run:
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        try:
            recipe = json.loads((folder / "recipe.json").read_text())
            lines = [line for line, _ in read_record(folder / "metrics.jsonl")]
        except OSError as error:
            raise UserError(f"{folder}: is not the folder of a run ({Path(error.filename).name} is missing)") from error
        except ValueError as error:
            raise UserError(f"{folder}: its record cannot be read ({error})") from error
        self.settings: dict[str, Any] = {f"{s}.{k}": value for s, keys in recipe.items() for k, value in keys.items()}
        self.settings |= _machine(folder / "environment.json")
        self.metrics: dict[str, float] = {}
        self.step, self.status = 0, "not yet"
        for line in lines:
            if "metrics" in line:
                self.step = max(self.step, line["step"])
                self.metrics |= {name: float(value) for name, value in line["metrics"].items()}
                self.status = "not yet"
            elif line.get("event") == "end":
                self.status = line["status"].lower()


def _machine(path: Path) -> dict[str, Any]:
    """Code and machine of a run; runs of earlier releases did not record them."""
    if not path.is_file():
        return {}
    here = json.loads(path.read_text())
    ranks = here["ranks"]
    found = {"git commit": here["git_commit"][:12] + (" and changes" if here["git_dirty"] else "")}
    found |= {"ranks": len(ranks), "device": ranks[0]["device"], "host": ranks[0]["host"]}
    return found | {f"version of {name}": number for name, number in here["versions"].items()}


def _names(runs: list[_Run]) -> list[str]:
    names = [run.folder.resolve().name for run in runs]
    return names if len(set(names)) == len(names) else [str(run.folder) for run in runs]


def _order(name: str) -> tuple[int, str]:
    return next(number for number, start in enumerate(SHOWN) if name.startswith(start)), name


def _text(value: Any) -> str:
    return "-" if value is None else ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}" if abs(value) < 1e4 else f"{value:.0f}"


def _line(row: list[str], widths: list[int]) -> str:
    first, *rest = row
    cells = (cell.rjust(width) for cell, width in zip(rest, widths[1:], strict=True))
    return f"  {first:<{widths[0]}}  " + "  ".join(cells)
