"""The results of tests/bench/latents.py as a table and as a chart: means over seeds, with intervals."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ilvr_ds.evaluation.intervals import share_interval
from ilvr_ds.pictures.charts import Bar, draw_accuracy
from tests.bench.latents_arms import LOOK

READINGS = ("own", "true", "zeros", "noise", "other_sample", "pad_embedding", "markers", "skipped", "donor")
Groups = dict[tuple[str, int, str], list[dict[str, Any]]]
"""Lines of results by arm, number of signs and stage, one a seed."""
STAGES = {"1": "1", "detached": "2, detached", "through": "2, targets kept, full chain", "full": "2, published"}
_T95 = (12.71, 4.30, 3.18, 2.78, 2.57)
"""Two-sided 95 % points of Student's t for 1 to 5 degrees of freedom."""


def read_results(path: Path) -> Groups:
    """Lines of the file by arm, number of signs and stage, one a seed: of a repeated one the last."""
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    latest = {(line["arm"], line["signs"], line["stage"], line["seed"]): line for line in lines}
    groups: Groups = {}
    for (arm, signs, stage, _), line in latest.items():
        groups.setdefault((arm, signs, stage), []).append(line)
    return groups


def table(groups: Groups) -> list[str]:
    """A Markdown table: per cent of right answers by what stood in the latents' place."""
    shown = [name for name in READINGS if any(name in line for lines in groups.values() for line in lines)]
    rows = [["arm", "N", "stage", "seeds", *shown]]
    for (arm, signs, stage), lines in groups.items():
        cells = [in_per_cent([line[name] for line in lines if name in line]) for name in shown]
        rows.append([arm, str(signs), stage_of(groups, arm, signs, stage), str(len(lines)), *cells])
    return [f"| {' | '.join(row)} |" for row in (rows[0], ["---"] * len(rows[0]), *rows[1:])]


def stage_of(groups: Groups, arm: str, signs: int, stage: str) -> str:
    """The stage in words, and which seeds ended before the last step of it or of what it began from."""
    cut = [f"seed {line['seed']}: {words}" for line in groups[arm, signs, stage] for words in _cut_short(groups, line)]
    return STAGES[stage] + (f" (ended early, {'; '.join(cut)})" if cut else "")


def _cut_short(groups: Groups, line: dict[str, Any]) -> Iterator[str]:
    """What was not trained to its end, of a line and of the runs before it; older lines do not say their plan."""
    before = [(LOOK, 0, "1")] if line["signs"] == 0 and line["arm"] != LOOK else []
    before += [(line["arm"], line["signs"], "1")] if line["stage"] != "1" else []
    earlier = [other for key in before for other in groups.get(key, []) if other["seed"] == line["seed"]]
    for run in (*earlier, line):
        if "planned_steps" in run and run["steps"] < run["planned_steps"]:
            name = "look" if run["arm"] == LOOK else f"stage {run['stage'] if run['stage'] == '1' else 2}"
            yield f"{run['steps']} of {run['planned_steps']} steps of {name}"


def draw_results(groups: Groups, path: Path) -> None:
    """Own answers of each arm and second stage, and beside them what zeros leave."""
    bars = list(bars_of(groups))
    draw_accuracy("right free answers (95 % interval: of the seeds' mean; with one seed, of its share)", bars, path)


def bars_of(groups: Groups) -> Iterator[Bar]:
    """Means over seeds with the interval that Student's t gives them, of one seed with Wilson's of its answers; n are
    the answers of all seeds together. Lines from before they said it have no n, and one of them no interval."""
    lengths = len({signs for _, signs, _ in groups})
    for (arm, signs, stage), lines in groups.items():
        is_cut = any(words for line in lines for words in _cut_short(groups, line))
        for name in ("own", "zeros"):
            if mine := [line for line in lines if name in line]:
                values, counts = [line[name] for line in mine], [line.get("samples", {}).get(name) for line in mine]
                samples = None if None in counts else sum(counts)
                title = (
                    arm
                    + f", N = {signs}" * (lengths > 1)
                    + f", {stage}" * (stage != "1")
                    + ", ended early" * is_cut
                    + ", zeros" * (name != "own")
                )
                yield Bar(title, sum(values) / len(values), *_interval(values, samples), samples, 0.25)


def _interval(values: Sequence[float], samples: int | None) -> tuple[float, float]:
    """95 %; nan where it is not known."""
    if len(values) > 1:
        mean, half = sum(values) / len(values), half_width(values)
        return max(0.0, mean - half), min(1.0, mean + half)
    return share_interval(values[0] * samples, samples) if samples else (math.nan, math.nan)


def in_per_cent(values: Sequence[float]) -> str:
    """ "93.1", of several seeds "93.1 ± 2.0" with the half-width of the 95 % interval of the mean."""
    if not values:
        return ""
    mean = f"{100 * sum(values) / len(values):.1f}"
    return mean if len(values) == 1 else f"{mean} ± {100 * half_width(values):.1f}"


def half_width(values: Sequence[float]) -> float:
    """Of the 95 % interval of the mean of two values or more, by Student's t."""
    mean = sum(values) / len(values)
    deviation = math.sqrt(sum((value - mean) ** 2 for value in values) / (len(values) - 1))
    return _T95[min(len(values), 6) - 2] * deviation / math.sqrt(len(values))
