"""`ilvr-ds evaluate` on the demo, and what it wrote."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def arguments(model: Path, demo: Path, output: Path, *more: str) -> list[str]:
    fixed = ["--benchmark", "comt", "--batch-size", "5", "--max-new-tokens", "24"]
    return [
        "evaluate",
        "--model",
        f"{model}",
        "--shards",
        f"{demo / 'held_out'}",
        "--output",
        f"{output}",
        *fixed,
        *more,
    ]


def lines_of(output: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (output / "samples.jsonl").read_text().splitlines()]
    for line in lines:
        line.pop("speed")
    return lines


def scores_of(folder: Path) -> dict[str, Any]:
    scores: dict[str, Any] = json.loads((folder / "scores.json").read_text())
    return scores
