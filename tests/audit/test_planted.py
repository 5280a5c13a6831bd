"""The verdict on models that were planted: it must be the one that is true by construction."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Audit = Callable[..., dict[str, Any]]


def accuracies(report: dict[str, Any]) -> dict[str, float]:
    return {name: part["accuracy"] for name, part in report["replacement"].items()}


def test_latents_that_are_read_are_used(audit_of: Audit, tmp_path: Path) -> None:
    report = audit_of("uses")
    assert report["verdict_kind"] == "used"
    found = accuracies(report)
    assert found["own"] == found["true"] == found["first_repeated"] == found["half_slots"] == 1.0
    assert found["zeros"] == found["markers"] == found["skipped"] == found["pad_embedding"] == 0.25
    assert found["other_sample"] < 0.6 and report["replacement"]["other_sample"]["answers_changed"] > 0.4
    assert (
        report["replacement"]["zeros"]["answer_logp_change"] < -1 < report["replacement"]["true"]["answer_logp_change"]
    )
    swap = report["donor"]
    assert (swap["members"], swap["pairs"], swap["same_words"]) == (24, 12, True)
    assert swap["follows_donor"] == swap["strict_flips"] == swap["follows_donors_response"] == 1.0
    assert swap["self"] == swap["self_changed"] == swap["unrelated"] == 0.0
    inside = report["inside"]
    assert inside["retrieval"]["others"]["top_1"] > 0.9 > 10 * inside["retrieval"]["others"]["chance_1"]
    assert inside["retrieval"]["image"]["top_1"] == inside["retrieval"]["image"]["chance_1"] == 0.25, "equal patches"
    assert inside["latents"]["cosine_across_samples"] < 0.5
    seen = report["barred"]
    assert [seen[name]["own"]["accuracy"] for name in ("image", "prompt", "image_for_words")] == [1.0] * 3
    assert [seen[name]["zeros"]["accuracy"] for name in ("image", "prompt", "image_for_words")] == [0.25] * 3
    page = (tmp_path / "out/audit.md").read_text()
    assert page.startswith("**The latents are used: without them 75 points are lost [")
    for name in ("replacement", "retrieval", "latents-1"):
        assert (tmp_path / f"out/{name}.png").read_bytes()[:4] == b"\x89PNG" and f"({name}.png)" in page


def test_dummies_are_not_used_and_the_verdict_says_what_would_have_been_seen(audit_of: Audit) -> None:
    report = audit_of("ignores")
    assert report["verdict_kind"] == "unused"
    assert set(accuracies(report).values()) == {1.0}
    assert "points would have been seen (95 %, power 80 %)" in report["verdict"]
    assert report["donor"]["follows_donor"] == 0.0
    assert "nearly equal" not in report["verdict"]


def test_an_answer_from_the_image_alone_is_told(audit_of: Audit) -> None:
    """Latents hold the colour and nobody reads them: with the image out of sight nothing is left."""
    report = audit_of("ignores", "--tests", "replacement,barred")
    assert "they come from it, not from the latents" in report["verdict"]
    assert report["barred"]["image_for_words"]["own"]["accuracy"] == 0.25
    assert "donor" not in report and "inside" not in report


def test_a_placeholder_is_not_taken_for_use(audit_of: Audit) -> None:
    report = audit_of("placeholder")
    assert report["verdict_kind"] == "placeholder"
    found = accuracies(report)
    assert found["zeros"] == 0.25 and found["other_sample"] == found["noise"] == 1.0
    assert "what it says is not used" in report["verdict"]


def test_collapsed_latents_are_named(audit_of: Audit) -> None:
    report = audit_of("collapsed")
    assert report["verdict_kind"] == "unused"
    assert report["inside"]["latents"]["cosine_across_samples"] == pytest.approx(1.0)
    assert report["inside"]["latents"]["effective_rank"] == pytest.approx(1.0, abs=0.01)
    assert report["inside"]["targets"]["cosine_across_samples"] < 0.5
    assert "the latents are nearly equal across samples (cosine 1.00)" in report["verdict"].lower()
    retrieval = report["inside"]["retrieval"]
    assert retrieval["image"]["top_1"] == pytest.approx(retrieval["image"]["chance_1"])


def test_data_without_helper_images_leave_out_what_needs_them(audit_of: Audit) -> None:
    report = audit_of("uses", data="plain")
    assert report["verdict_kind"] == "used"
    assert "true" not in report["replacement"]
    assert report["left_out"]["true"] == report["left_out"]["retrieval and targets"] == "no sample has helper images"
    assert report["inside"]["retrieval"]["latents"] == report["inside"]["targets"]["vectors"] == 0
    assert report["inside"]["latents"]["vectors"] == 24
    assert report["replacement"]["zeros"]["answer_logp_change"] < -1
