from __future__ import annotations

import pytest

from ilvr_ds.errors import UserError
from ilvr_ds.evaluation.benchmarks import BENCHMARKS
from ilvr_ds.evaluation.modes import AUTO, check_mode, choose_mode, instruction_of


def test_a_model_answers_as_it_was_trained_unless_told_otherwise() -> None:
    assert choose_mode(AUTO, has_latents=True) == "latent" and choose_mode(AUTO, has_latents=False) == "cot"
    assert choose_mode("direct", has_latents=True) == "direct"


def test_only_models_that_were_not_trained_to_are_told_how_to_answer() -> None:
    for benchmark in BENCHMARKS.values():
        assert instruction_of("latent", benchmark.form) == ""
        assert all(benchmark.form in instruction_of(mode, benchmark.form) for mode in ("cot", "direct"))


def test_an_unknown_mode_is_a_mistake() -> None:
    with pytest.raises(UserError, match="--mode: 'words' is unknown; valid: auto, cot, direct, latent"):
        check_mode("words")
