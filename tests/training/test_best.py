from __future__ import annotations

from typing import Any

import pytest

from ilvr_ds.errors import UserError
from ilvr_ds.training.best import Best


def fed(best: Best, *values: float) -> list[bool]:
    """Which of these evaluations, of steps 10, 20, ..., are the best so far."""
    return [best.add(10 * number, {best.metric: value}) for number, value in enumerate(values, 1)]


@pytest.mark.parametrize(
    ("metric", "values", "better"),
    [
        ("eval/ce", [3.0, 2.0, 2.5, 2.0, 1.0], [True, True, False, False, True]),
        ("eval/answer_accuracy", [0.1, 0.3, 0.2, 0.3, 0.4], [True, True, False, False, True]),
        ("eval/ce", [float("nan"), 2.0, float("nan")], [False, True, False]),
    ],
)
def test_less_loss_and_more_right_answers_are_better(metric: str, values: list[float], better: list[bool]) -> None:
    assert fed(Best(metric), *values) == better


def test_without_a_metric_nothing_is_better() -> None:
    best = Best()
    assert not best.add(10, {"eval/ce": 1.0}) and not best.is_over and best.summary() is None


def test_patience_counts_evaluations_since_the_best() -> None:
    best = Best("eval/ce", patience=2)
    assert fed(best, 2.0, 2.1) == [True, False] and not best.is_over
    assert best.add(30, {"eval/ce": 1.9}) and not best.is_over
    assert fed(best, 1.9, 2.0) == [False, False] and best.is_over
    assert best.summary() == "best eval/ce 1.9000, after step 30"
    assert fed(Best("eval/ce"), *[2.0] * 9)[1:] == [False] * 8 and not Best("eval/ce").is_over


def test_a_metric_that_is_not_there_is_a_mistake() -> None:
    with pytest.raises(UserError, match=r"checkpoint.keep_best is eval/answer_accuracy, .*no sample has an answer"):
        Best("eval/answer_accuracy").add(10, {"eval/ce": 1.0})
    with pytest.raises(UserError, match=r"checkpoint.keep_best is eval/ce, .*no held-out sample could be used"):
        Best("eval/ce").add(10, {"eval/skipped": 512.0})


EARLIER: dict[str, Any] = {"metric": "eval/ce", "value": 1.5, "step": 20}
LAST: dict[str, Any] = {"metric": "eval/ce", "value": 1.2, "step": 40}


@pytest.mark.parametrize(
    ("on_disk", "done", "found", "since"),
    [
        (None, 30, EARLIER, 1),
        (EARLIER, 30, EARLIER, 1),
        (LAST, 40, LAST, 0),  # the last evaluation of a run, after its last checkpoint
        (LAST, 30, EARLIER, 1),  # the run went back: what came after is no longer its own
        ({**LAST, "metric": "eval/answer_accuracy"}, 40, EARLIER, 1),
    ],
)
def test_a_run_goes_on_with_its_best(on_disk: Any, done: int, found: Any, since: int) -> None:
    best = Best("eval/ce", patience=3)
    best.load({"found": EARLIER, "since": 1}, on_disk, done)
    assert (best.found, best.since) == (found, since)


def test_a_run_from_before_there_was_a_best_begins_to_look() -> None:
    best = Best("eval/ce")
    best.load(None, None, 30)
    assert best.add(40, {"eval/ce": 9.0})
    found = {"metric": "eval/ce", "value": 9.0, "step": 40}
    assert best.state_dict() == {"found": found, "since": 0, "last": 40, "metric": "eval/ce", "samples": ""}


def test_evaluations_after_the_last_checkpoint_count() -> None:
    """As of a run that has ended, or that left an evaluation to its next start. Those that the checkpoint knows do not
    count twice, nor those of steps that are done again."""
    state = {"found": EARLIER, "since": 1, "last": 30, "metric": "eval/ce", "samples": ""}
    recorded = [(20, {"eval/ce": 1.5}), (30, {"eval/ce": 1.6}), (40, {"eval/ce": 1.7}), (50, {"eval/ce": 1.0})]
    best = Best("eval/ce", patience=2)
    best.load(state, EARLIER, 40, recorded)
    assert (best.found, best.since, best.is_over) == (EARLIER, 2, True)
    best = Best("eval/ce")
    best.load(state, None, 50, recorded)
    assert (best.found and best.found["step"], best.since) == (50, 0)
    best = Best("eval/ce")
    best.load(Best().state_dict(), None, 50, recorded)
    assert best.found is None, "of these no checkpoint was kept"


def test_values_on_other_held_out_samples_are_not_compared(caplog: pytest.LogCaptureFixture) -> None:
    """evaluation.max_samples or data.eval_shards may change when a run goes on: nothing might be better ever again."""
    before = Best("eval/ce", samples="a, 8")
    before.add(20, {"eval/ce": 0.1})
    after = Best("eval/ce", patience=1, samples="a, 512")
    after.load(before.state_dict(), EARLIER, 30, [(30, {"eval/ce": 0.1})])
    assert (after.found, after.since) == (None, 0) and "on other samples than before" in caplog.text
    again = Best("eval/ce", patience=1, samples="a, 512")  # killed before its first evaluation
    a_best = {**EARLIER, "samples": "a, 8"}
    again.load(after.state_dict(), a_best, 30, [(20, {"eval/ce": 0.1}), (30, {"eval/ce": 0.1})])
    assert (again.found, again.since) == (None, 0)
    assert again.add(40, {"eval/ce": 2.0})
    assert again.found == {"metric": "eval/ce", "value": 2.0, "step": 40, "samples": "a, 512"}
