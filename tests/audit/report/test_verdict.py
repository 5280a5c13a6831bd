"""The rules, case by case."""

from __future__ import annotations

from typing import Any, get_args, get_type_hints

import numpy as np
import pytest

from ilvr_ds.audit.report import summary
from ilvr_ds.audit.report.verdict import judge
from ilvr_ds.config import SelectionConfig


def part(difference: float, half: float = 0.03, smallest: float = 0.031) -> dict[str, Any]:
    return {
        "difference": difference,
        "interval_95": [difference - half, difference + half],
        "smallest_effect": smallest,
        "samples": 800,
    }


def report(with_segments: int = 800, **parts: Any) -> dict[str, Any]:
    inside = parts.pop("inside", {})
    return {
        "samples": 800,
        "latents": {"answers_with_segments": with_segments},
        "replacement": {"own": {"accuracy": 0.9}, **{name: value for name, value in parts.items() if name != "extra"}},
        "inside": inside,
        **parts.get("extra", {}),
    }


@pytest.mark.parametrize(
    ("parts", "kind", "words"),
    [
        (
            {"zeros": part(-0.61, 0.04), "other_sample": part(-0.74, 0.04)},
            "used",
            "them 61 points are lost [57, 65], with another sample's in their place 74 points are lost [70, 78]",
        ),
        ({"zeros": part(0.0), "other_sample": part(-0.2)}, "used", "Zeros in their place lose nothing that 800"),
        (
            {"zeros": part(-0.2), "other_sample": part(-0.01)},
            "placeholder",
            "no loss is seen (3.1 points would have been at 800 samples)",
        ),
        (
            {"zeros": part(-0.01), "other_sample": part(0.0, smallest=0.04)},
            "unused",
            "at 800 samples a loss of 4.0 points would have been seen (95 %, power 80 %)",
        ),
        ({"zeros": part(0.1), "other_sample": part(0.0)}, "unused", "place zeros raise accuracy by 10 points."),
        (
            {"zeros": part(0.0), "other_sample": part(0.0), "true": part(0.5)},
            "unused",
            "The true features in their place would gain 50 points [47, 53].",
        ),
        (
            {"zeros": part(0.0), "other_sample": part(0.0), "inside": {"targets": {"cosine_across_samples": 0.94}}},
            "unused",
            "The targets are nearly equal across samples (cosine 0.94).",
        ),
        ({"zeros": part(-0.2)}, "placeholder", "another sample's latents were not tried"),
        ({"with_segments": 399}, "no_latents", "399 of 800 answers hold a segment"),
        ({}, "not_tested", "nothing can be said"),
    ],
)
def test_the_first_rule_that_fits_is_taken(parts: dict[str, Any], kind: str, words: str) -> None:
    verdict = judge(report(**parts))
    assert verdict.kind == kind
    assert words in verdict.text


@pytest.mark.parametrize("true", [None, 0.0, 0.5])
@pytest.mark.parametrize("cosine", [None, 0.1, 0.95])
def test_no_effect_is_never_said_without_what_would_have_been_seen(true: float | None, cosine: float | None) -> None:
    inside = {"targets": {"cosine_across_samples": cosine}, "latents": {"cosine_across_samples": cosine}}
    for zeros in (0.0, -0.2):
        parts = {"zeros": part(zeros), "other_sample": part(0.0), "inside": inside}
        verdict = judge(report(**parts, **({} if true is None else {"true": part(true)})))
        assert "points would have been" in verdict.text and verdict.try_next


def test_a_donor_that_is_not_followed_is_said() -> None:
    swap = {
        "members": 800, "same_words": True, "follows_donor": 0.3, "interval_95": [0.27, 0.33], "unrelated": 0.29,
        "difference_interval_95": [-0.02, 0.04],
    }  # fmt: skip
    verdict = judge(report(zeros=part(-0.6), other_sample=part(-0.6), extra={"donor": swap}))
    assert verdict.kind == "used" and "no more than what any disturbance does" in verdict.text
    swap |= {"follows_donor": 0.9, "difference_interval_95": [0.5, 0.7]}
    assert "disturbance" not in judge(report(zeros=part(-0.6), other_sample=part(-0.6), extra={"donor": swap})).text


def simulated(rng: np.random.Generator, samples: int, lost: float, gained: float) -> dict[str, Any]:
    """An audit in which zeros and another sample's latents lose a share of right answers and gain another."""
    own = rng.random(samples) < 0.6

    def replaced() -> Any:
        flips = rng.random(samples)
        return np.where(own, flips >= lost / 0.6, flips < gained / 0.4)

    zeros, other = replaced(), replaced()
    lines = [
        {
            "right": bool(own[n]),
            "own_logp": 0.0,
            "replacement": {
                name: {"right": bool(right[n]), "changed": False, "logp": 0.0, "has_source": True}
                for name, right in (("zeros", zeros), ("other_sample", other))
            },
        }
        for n in range(samples)
    ]
    found = summary.replacement(lines, ("zeros", "other_sample"))
    latents = {"answers_with_segments": samples}
    return {"samples": samples, "latents": latents, "replacement": found}


@pytest.mark.parametrize(("lost", "gained"), [(0.05, 0.05), (0.15, 0.03)], ids=["null", "12 points"])
def test_a_thousand_audits_say_what_is_so(lost: float, gained: float) -> None:
    """Catches a verdict, or an interval in it, that is wrong more often than it says."""
    rng = np.random.default_rng(2)
    kinds, covered = [], 0
    for _ in range(1000):
        report = simulated(rng, 400, lost, gained)
        kinds.append(judge(report).kind)
        low, high = report["replacement"]["other_sample"]["interval_95"]
        covered += low <= gained - lost <= high
    assert 930 <= covered <= 970
    if lost == gained:
        assert kinds.count("used") <= 40 and kinds.count("placeholder") <= 40, "2.5 % each"
    else:
        assert kinds.count("used") >= 990


def test_a_selection_is_not_advised_that_was_there_already() -> None:
    """Catches "selection.pool changed" said to somebody who trained with it."""
    alike = {"zeros": part(0.0), "other_sample": part(0.0), "inside": {"targets": {"cosine_across_samples": 1.0}}}
    advised = {
        pool: judge(report(**alike, extra={"selection": {"pool": pool}})).try_next[0]
        for pool in get_args(get_type_hints(SelectionConfig)["pool"])
    }
    assert "selection.pool changed or region" in advised["all"]
    assert "selection.pool region" in advised["changed"] and "other boxes" in advised["region"]
