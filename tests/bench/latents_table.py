"""The results of tests/bench/latents.py as a table and as a chart: means over seeds, with intervals."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ilvr_ds.pictures.charts import Bar, draw_accuracy

READINGS = ("own", "true", "zeros", "noise", "other_sample", "pad_embedding", "markers", "skipped", "donor")
STAGES = {"1": "1", "detached": "2, detached", "through": "2, targets kept, full chain", "full": "2, published"}
_T95 = (12.71, 4.30, 3.18, 2.78, 2.57)
"""Two-sided 95 % points of Student's t for 1 to 5 degrees of freedom."""


def read_results(path: Path) -> dict[tuple[str, int, str], list[dict[str, Any]]]:
    """Lines of the file by arm, number of signs and stage, one a seed: of a repeated one the last."""
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    latest = {(line["arm"], line["signs"], line["stage"], line["seed"]): line for line in lines}
    groups: dict[tuple[str, int, str], list[dict[str, Any]]] = {}
    for (arm, signs, stage, _), line in latest.items():
        groups.setdefault((arm, signs, stage), []).append(line)
    return groups


def table(groups: dict[tuple[str, int, str], list[dict[str, Any]]]) -> list[str]:
    """A Markdown table: per cent of right answers by what stood in the latents' place."""
    shown = [name for name in READINGS if any(name in line for lines in groups.values() for line in lines)]
    rows = [["arm", "N", "stage", "seeds", *shown]]
    for (arm, signs, stage), lines in groups.items():
        cells = [in_per_cent([line[name] for line in lines if name in line]) for name in shown]
        rows.append([arm, str(signs), STAGES[stage], str(len(lines)), *cells])
    return [f"| {' | '.join(row)} |" for row in (rows[0], ["---"] * len(rows[0]), *rows[1:])]


def draw_results(groups: dict[tuple[str, int, str], list[dict[str, Any]]], path: Path, samples: int) -> None:
    """Own answers of each arm and second stage, and beside them what zeros leave; `samples`: answers of a seed."""
    bars, lengths = [], len({signs for _, signs, _ in groups})
    for (arm, signs, stage), lines in groups.items():
        for name in ("own", "zeros"):
            if values := [line[name] for line in lines if name in line]:
                mean, half = sum(values) / len(values), half_width(values)
                title = (
                    arm + f", N = {signs}" * (lengths > 1) + f", {stage}" * (stage != "1") + ", zeros" * (name != "own")
                )
                low, high = max(0.0, mean - half), min(1.0, mean + half)
                bars.append(Bar(title, mean, low, high, samples * len(values), 0.25))
    draw_accuracy("free answers that are right, mean of seeds (95 % interval)", bars, path)


def in_per_cent(values: Sequence[float]) -> str:
    """ "93.1", of several seeds "93.1 ± 2.0" with the half-width of the 95 % interval of the mean."""
    if not values:
        return ""
    mean = f"{100 * sum(values) / len(values):.1f}"
    return mean if len(values) == 1 else f"{mean} ± {100 * half_width(values):.1f}"


def half_width(values: Sequence[float]) -> float:
    """Of the 95 % interval of the mean, by Student's t; 0 for a single value, which says nothing of it."""
    if len(values) == 1:
        return 0.0
    mean = sum(values) / len(values)
    deviation = math.sqrt(sum((value - mean) ** 2 for value in values) / (len(values) - 1))
    return _T95[min(len(values), 6) - 2] * deviation / math.sqrt(len(values))
