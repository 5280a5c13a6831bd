from __future__ import annotations

from ilvr_ds.training.evaluation import _metrics

SUMS = {"ce": 6.0, "supervised": 3.0, "alignment": 1.0, "contrastive": 2.0, "slots": 4.0, "right": 3.0, "answers": 4.0}


def test_groups_become_names_that_mlflow_takes() -> None:
    """Groups are free text: MLflow refuses brackets, commas and a name that ends in a slash."""
    names = ["", "a (b), c", "level-3", "none"]
    groups = {
        f"{kind}/{name}": float(kind == "answers" and name != "none") for name in names for kind in ("right", "answers")
    }
    metrics = _metrics(SUMS, groups, names)
    assert metrics == {
        "eval/ce": 2.0,
        "eval/alignment": 0.25,
        "eval/contrastive": 0.5,
        "eval/answers": 4.0,
        "eval/answer_accuracy": 0.75,
        "eval/answer_accuracy/a _b__ c": 0.0,
        "eval/answer_accuracy/level-3": 0.0,
    }
