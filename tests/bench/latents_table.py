"""The results of tests/bench/latents.py as a table and as a chart: means over seeds, with intervals."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

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


def in_per_cent(values: Sequence[float]) -> str:
    """ "93.1", of several seeds "93.1 ± 2.0" with the half-width of the 95 % interval of the mean."""
    if not values:
        return ""
    mean = sum(values) / len(values)
    if len(values) == 1:
        return f"{100 * mean:.1f}"
    deviation = math.sqrt(sum((value - mean) ** 2 for value in values) / (len(values) - 1))
    return f"{100 * mean:.1f} ± {100 * _T95[min(len(values), 6) - 2] * deviation / math.sqrt(len(values)):.1f}"
