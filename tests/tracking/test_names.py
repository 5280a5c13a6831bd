"""Each kind of task has a metric of its own, which MLflow takes."""

from __future__ import annotations

import pytest

from ilvr_ds.tracking.names import LONGEST, metric_name

KINDS = [
    "\u8a08\u6570", "\u6bd4\u8f03", "Z\u00e4hlen", "Z\u00e5hlen", "L(1)", "L[1]", "L_1_", "L{1}", "a/b", "a_b", "a\\b",
    "", ".", "..", "none", "e\u0301", "e\u0300", "x" * 300, "x" * 301, "level-3", "a b: c", "50 %", "50 #", "a\n", "a",
]  # fmt: skip


def test_kinds_share_no_name() -> None:
    names = [metric_name("eval/answer_accuracy", kind) for kind in KINDS]
    assert len(set(names)) == len(KINDS)
    assert len({name.casefold() for name in names}) == len(KINDS)


@pytest.mark.parametrize("kind", KINDS)
def test_mlflow_takes_the_name(kind: str) -> None:
    from mlflow.entities import Metric
    from mlflow.utils.validation import MAX_ENTITY_KEY_LENGTH, _validate_metric

    assert LONGEST == MAX_ENTITY_KEY_LENGTH
    name = metric_name("loss/ce_by_type", kind)
    _validate_metric(name, 0.5, 1, 1)
    assert Metric(name, 0.5, 1, 1).key == name and name.startswith("loss/ce_by_type/") and name.count("/") == 2


@pytest.mark.parametrize("kind", ["deletion", "level3", "\u8a08\u6570", "Z\u00e4hlen", "a b: c.d-e_f"])
def test_kinds_that_mlflow_takes_are_their_own_name(kind: str) -> None:
    assert metric_name("p", kind) == f"p/{kind}"


def test_a_rewritten_kind_is_still_readable() -> None:
    assert metric_name("p", "L(1)").startswith("p/L_1_-")
