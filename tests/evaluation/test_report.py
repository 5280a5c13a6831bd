"""Scores as metrics."""

from __future__ import annotations

from typing import Any

from ilvr_ds.evaluation.report import metrics_of
from ilvr_ds.tracking.names import metric_name


def scores_of(*types: str) -> dict[str, Any]:
    """Scores of which every type has another accuracy."""
    parts = {name: {"accuracy": number / 10} for number, name in enumerate(types)}
    return {"speed": {}, "rules": {"r": {"accuracy": 0.5, "macro_mean": 0.5, "types": parts}}}


def test_every_type_has_a_metric_of_its_own() -> None:
    types = ["", "all", "L(1)", "L[1]", "計数", "比較"]
    metrics = metrics_of(scores_of(*types))
    assert [metrics[metric_name("r/accuracy", name)] for name in types] == [number / 10 for number in range(6)]
    assert len(metrics) == 2 + len(types)


def test_samples_without_a_type_are_the_whole() -> None:
    assert metrics_of(scores_of("")) == {"r/accuracy": 0.5, "r/macro_mean": 0.5}
