from __future__ import annotations

from types import SimpleNamespace

from ilvr_ds.config import LossConfig
from ilvr_ds.training.held_out import _accuracies
from ilvr_ds.training.step import StageOneStep

SUMS = {"ce": 6.0, "supervised": 3.0, "alignment": 1.0, "contrastive": 2.0, "slots": 4.0, "right": 3.0, "answers": 4.0}


def test_groups_become_names_that_mlflow_takes() -> None:
    """Groups are free text: MLflow refuses brackets, commas and a name that ends in a slash."""
    names = ["", "a (b), c", "level-3", "none", "計数", "比較"]
    groups = {
        f"{kind}/{name}": float(kind == "answers" and name != "none") for name in names for kind in ("right", "answers")
    }
    metrics = _accuracies(SUMS, groups, names)
    assert metrics == {
        "eval/answers": 4.0,
        "eval/answer_accuracy": 0.75,
        "eval/answer_accuracy/a _b__ c-c0084273": 0.0,
        "eval/answer_accuracy/level-3": 0.0,
        "eval/answer_accuracy/計数": 0.0,
        "eval/answer_accuracy/比較": 0.0,
    }


def test_losses_are_means_over_tokens_and_slots() -> None:
    step = SimpleNamespace(settings=LossConfig(ce_weight=1.0, align_weight=1.0, contrastive_weight=0.1))
    losses = StageOneStep.losses(step, SUMS)  # type: ignore[arg-type]
    assert {name: losses[name] for name in ("ce", "alignment", "contrastive")} == {
        "ce": 2.0,
        "alignment": 0.25,
        "contrastive": 0.5,
    }
