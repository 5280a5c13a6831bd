"""The four operations in tests/bench/latents.py: what is read of each, and their table."""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

from tests.bench.latents_table import Groups, in_per_cent, stage_of

SHOWN = ("own", "true", "zeros", "other_sample", "same_group")
"""Of the audit's replacements, operation by operation"""


def accuracy_by_operation(readings: Path) -> dict[str, Any]:
    """What stood in the latents' place, by operation, from the answers of an audit or an evaluation.

    readings: the folder that `audit` or `evaluate` wrote. Returns {"by_operation": {operation: {reading: accuracy}}}.
    """
    if not (readings / "audit.json").exists():
        scores = json.loads((readings / "scores.json").read_text())["rules"]
        types = next(iter(scores.values()))["types"]
        return {"by_operation": {name: {"own": part["accuracy"]} for name, part in types.items()}}
    right: dict[str, dict[str, list[bool]]] = defaultdict(lambda: defaultdict(list))
    kinds = {}
    for line in _lines(readings, "own"):
        kinds[line["number"]] = line["type"]
        right[line["type"]]["own"].append(line["right"])
    for line in _lines(readings, "part"):
        for name, part in line.get("replacement", {}).items():
            if name in SHOWN and part["has_source"]:
                right[kinds[line["number"]]][name].append(part["right"])
    return {
        "by_operation": {
            kind: {name: sum(verdicts) / len(verdicts) for name, verdicts in parts.items()}
            for kind, parts in sorted(right.items())
        }
    }


def operations_table(groups: Groups) -> list[str]:
    """A Markdown table: per cent of right answers by operation and what stood in the latents' place."""
    rows = [["arm", "stage", "operation", *SHOWN], ["---"] * (3 + len(SHOWN))]
    for (arm, signs, stage), lines in groups.items():
        for kind in sorted({kind for line in lines for kind in line.get("by_operation", {})}):
            parts = [line["by_operation"][kind] for line in lines if kind in line.get("by_operation", {})]
            cells = [in_per_cent([part[name] for part in parts if name in part]) for name in SHOWN]
            rows.append([arm, stage_of(groups, arm, signs, stage), kind, *cells])
    return [f"| {' | '.join(row)} |" for row in rows]


def _lines(readings: Path, name: str) -> list[dict[str, Any]]:
    """Of all ranks."""
    return [json.loads(line) for file in sorted(readings.glob(f"{name}-*.jsonl")) for line in file.open()]
