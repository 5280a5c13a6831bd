from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch

from ilvr_ds.audit.readings.probability import AnswerProbability, last_words
from ilvr_ds.evaluation.ablation import latent_source
from ilvr_ds.generation.context import Context
from ilvr_ds.generation.generate import Generator
from ilvr_ds.generation.latent_sources import FirstRepeated, Given, HalfOwn
from ilvr_ds.generation.settings import GenerationSettings

if TYPE_CHECKING:
    from ilvr_ds.generation.answers import Answer
    from ilvr_ds.generation.loading import Reasoner
    from tests.golden_set import GoldenSet


@pytest.fixture(scope="module")
def asked(golden: GoldenSet, reasoner: Reasoner) -> tuple[AnswerProbability, list[Answer]]:
    """Three samples; the second answer is cut within its second segment."""
    start = reasoner.special.latent_start
    samples = golden.samples[:3]
    prompts = [reasoner.encoder.prompt(sample) for sample in samples]
    answers = []
    for row, prompt in enumerate(prompts):
        limit = 20 + reasoner.latent_size // 2 if row == 1 else 34
        settings = GenerationSettings(limit, forced={2: start, 18: start}, keep_latents=True)
        answers += Generator(reasoner, settings)([prompt]).answers
    return AnswerProbability(reasoner, samples, prompts, answers), answers


def one_by_one(
    reasoner: Reasoner, asked: AnswerProbability, row: int, tokens: list[int], latents: torch.Tensor
) -> float:
    """Token by token with a cache; `latents` [n, D] go to the latent pads in their order."""
    words = asked.words[row]
    context = Context(reasoner, [asked.prompts[row]], len(tokens) + len(words.tokens))
    hidden, total, used = context.prefill(), 0.0, 0
    for number, token in enumerate([*tokens, *words.tokens]):
        if number - len(tokens) in words.scored:
            total += float(reasoner.model.lm_head(hidden).log_softmax(-1)[0, token])
        is_latent = token == reasoner.special.latent_pad
        hidden = context.step(torch.tensor([token]), latents[used : used + 1] if is_latent else hidden)
        used += is_latent
    return total


def until_last_segment(reasoner: Reasoner, answer: Answer) -> list[int]:
    last = len(answer.tokens) - answer.tokens[::-1].index(reasoner.special.latent_end)
    return answer.tokens[:last]


@torch.inference_mode()
def test_it_is_what_decoding_one_by_one_gives(
    reasoner: Reasoner, asked: tuple[AnswerProbability, list[Answer]]
) -> None:
    """Catches positions, padding, masks and latents at the wrong slots, of the row beside or of a cut segment."""
    probability, answers = asked
    banks = [list(answer.latents[: len(probability.own[row])]) for row, answer in enumerate(answers)]
    found = probability(Given(banks, reasoner.latent_size, reasoner.device))
    zeros = probability(latent_source("zeros", reasoner, answers, 0))
    markers = probability(latent_source("markers", reasoner, answers, 0))
    without = probability(None)
    special = reasoner.special
    for row, answer in enumerate(answers):
        tokens = until_last_segment(reasoner, answer)
        own = torch.cat(banks[row])
        assert found[row] == pytest.approx(one_by_one(reasoner, probability, row, tokens, own), abs=1e-3)
        assert zeros[row] == pytest.approx(one_by_one(reasoner, probability, row, tokens, own * 0), abs=1e-3)
        bare = [token for token in tokens if token != special.latent_pad]
        assert markers[row] == pytest.approx(one_by_one(reasoner, probability, row, bare, own), abs=1e-3)
        text = [token for token in bare if token not in (special.latent_start, special.latent_end)]
        assert without[row] == pytest.approx(one_by_one(reasoner, probability, row, text, own), abs=1e-3)
    assert len(probability.own[1]) == 1 and len(probability.own[0]) == 2
    assert len({round(value, 4) for value in (found[0], zeros[0], markers[0], without[0])}) == 4


@torch.inference_mode()
def test_slots_hold_what_their_source_says(reasoner: Reasoner, asked: tuple[AnswerProbability, list[Answer]]) -> None:
    probability, answers = asked
    tokens, K = until_last_segment(reasoner, answers[0]), reasoner.latent_size
    first = torch.cat([latents[:1].expand(K, -1) for latents in answers[0].latents])
    expected = one_by_one(reasoner, probability, 0, tokens, first)
    assert probability(FirstRepeated())[0] == pytest.approx(expected, abs=1e-3)
    pads = [reasoner.special.latent_pad] * (K // 2)
    spread: list[int] = []
    for token in tokens:
        if token != reasoner.special.latent_pad:
            spread += [token, *(pads if token == reasoner.special.latent_start else [])]
    expected = one_by_one(
        reasoner, probability, 0, spread, torch.cat([latents[: K // 2] for latents in answers[0].latents])
    )
    assert probability(HalfOwn())[0] == pytest.approx(expected, abs=1e-3)


def test_scored_is_the_answer_in_the_last_words(golden: GoldenSet, reasoner: Reasoner) -> None:
    for sample in golden.samples:
        words = last_words(reasoner, sample)
        decode = reasoner.encoder.tokenizer.decode
        if sample.answer and sample.answer in decode(words.tokens):
            assert sample.answer in decode(words.tokens[words.scored.start : words.scored.stop])
        else:
            assert words.scored == range(len(words.tokens))
