"""Free answers during training, on one rank; tests/distributed has those of several."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from ilvr_ds.evaluation.benchmarks import find_benchmark
from ilvr_ds.generation.generate import Generator
from ilvr_ds.generation.settings import GenerationSettings
from ilvr_ds.training import free_answers
from ilvr_ds.training.free_answers import FreeAnswers, Question

if TYPE_CHECKING:
    from ilvr_ds.generation.loading import Reasoner
    from tests.golden_set import GoldenSet


def test_so_many_are_answered_together_as_a_pass_may_have_tokens(
    golden: GoldenSet,
    reasoner: Reasoner,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Catches hundreds of prompts, with their images, in one pass beside the state of a training."""
    benchmark = find_benchmark("comt")
    questions = [Question(sample, reasoner.encoder.prompt(sample), benchmark, 0) for sample in golden.samples]
    longest = max(len(question.prompt.input_ids) for question in questions)
    sizes: list[int] = []
    generate = Generator.generate

    def counted(self: Generator, prompts: Any) -> Any:
        sizes.append(len(prompts))
        return generate(self, prompts)

    monkeypatch.setattr(Generator, "generate", counted)
    free = FreeAnswers(reasoner, questions, GenerationSettings(max_new_tokens=8))
    whole = free.answers()
    assert sizes == [len(questions)]
    monkeypatch.setattr(free_answers, "TOKENS_AT_ONCE", 4 * longest + 1)
    assert [answer.tokens for answer in free.answers()] == [answer.tokens for answer in whole]
    assert sizes[1:] == [4, len(questions) - 4]
