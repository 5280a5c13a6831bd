"""audit.md and audit.json of numbers that are not known."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ilvr_ds.audit.report import summary
from ilvr_ds.audit.report.page import write_report
from ilvr_ds.audit.report.verdict import Verdict


def test_the_ends_of_an_interval_of_one_sample_are_unknown(tmp_path: Path) -> None:
    """Catches a page that fails, or that is certain of one sample's log-probability."""
    part = {"has_source": True, "right": False, "logp": -1.5, "changed": True}
    hits = {"latents": 2, "image": [2, 2, 0.5, 2], "others": [1, 2, 0.5, 2]}
    lines = [{"right": True, "own_logp": -1.0, "replacement": {"zeros": part}, "retrieval": hits}]
    report: dict[str, Any] = {
        "model": "m", "data": "d", "samples": 1, "rule": "comt-official", "rule_version": "1", "selection_from": "x",
        "latents": {"segments_per_answer": 1.0, "answers_at_the_limit": 0}, "left_out": {},
        "replacement": summary.replacement(lines, ["zeros"]), "inside": {"retrieval": summary.retrieval(lines)},
    }  # fmt: skip
    write_report(report, Verdict("unused", "Nothing.", ()), [], tmp_path)
    said = json.loads((tmp_path / "audit.json").read_text(), parse_constant=lambda name: f"{name} is no JSON")
    assert said["replacement"]["zeros"]["answer_logp_change"] == -0.5
    assert said["replacement"]["zeros"]["answer_logp_interval_95"] == [None, None]
    assert said["inside"]["retrieval"]["image"]["interval_95"] == [None, None]
    [row] = [line for line in (tmp_path / "audit.md").read_text().splitlines() if line.startswith("| zeros")]
    assert "| -0.50 [unknown] | 1 |" in row
