"""The model that comes with the package, on trails: a decoder's answers are the plain loop's, token for token."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import islice
from typing import TYPE_CHECKING

import pytest
import torch

from ilvr_ds.demo.material import TRAINED, TRAINED_ON
from ilvr_ds.demo.task.generate import draw_samples
from ilvr_ds.evaluation.ablation import CONDITIONS, latent_source
from ilvr_ds.generation.context import Context
from ilvr_ds.generation.decoder import Decoder
from ilvr_ds.generation.generate import Generator
from ilvr_ds.generation.latent_sources import FirstRepeated, HalfOwn, LatentSource
from ilvr_ds.generation.loading import load_reasoner
from ilvr_ds.generation.settings import GenerationSettings

if TYPE_CHECKING:
    from ilvr_ds.data.sample import Sample
    from ilvr_ds.data.template import EncodedSample
    from ilvr_ds.generation.answers import Answer
    from ilvr_ds.generation.loading import Reasoner

SETTINGS = GenerationSettings(max_new_tokens=48, keep_latents=True)


@pytest.fixture(scope="module")
def plain() -> Reasoner:
    return load_reasoner(str(TRAINED), torch.device("cpu"), "fp32")


@pytest.fixture(scope="module")
def trails() -> list[Sample]:
    return list(islice(draw_samples(TRAINED_ON, 0, "held_out", 12), 12))


@pytest.fixture(scope="module")
def prompts(plain: Reasoner, trails: list[Sample]) -> list[EncodedSample]:
    return [plain.encoder.prompt(sample) for sample in trails]


@pytest.fixture(scope="module")
def own(plain: Reasoner, prompts: list[EncodedSample]) -> list[Answer]:
    return Generator(plain, SETTINGS)(prompts).answers


@pytest.fixture(scope="module")
def decoding(plain: Reasoner, own: list[Answer]) -> Reasoner:
    return replace(plain, decoder=Decoder(plain))


def test_own_latents_in_every_order(
    decoding: Reasoner, prompts: list[EncodedSample], own: list[Answer], trails: list[Sample]
) -> None:
    assert all(
        len(answer.steps) == 3 and sample.answer in answer.text for answer, sample in zip(own, trails, strict=True)
    )
    for rows, order in ((12, 1), (1, 1), (5, -1)):
        found = dict(Generator(decoding, SETTINGS).stream(prompts[::order], rows))
        for number, expected in enumerate(own[::order]):
            assert found[number].tokens == expected.tokens, (rows, order)
            for latents, those in zip(found[number].latents, expected.latents, strict=True):
                torch.testing.assert_close(latents, those, rtol=1e-3, atol=1e-4)


def test_what_an_audit_feeds_instead(
    plain: Reasoner, decoding: Reasoner, prompts: list[EncodedSample], own: list[Answer]
) -> None:
    """Replaced latents go on from prompts that were read once, in batches."""
    sources: dict[str, Callable[[], LatentSource]] = {"first_repeated": FirstRepeated, "half_slots": HalfOwn}
    for condition in CONDITIONS:
        sources[condition] = lambda condition=condition: latent_source(condition, plain, own, seed=0)
    contexts = [Context(reasoner, prompts, 48) for reasoner in (plain, decoding)]
    said = set()
    for name, source in sources.items():
        expected, found = (
            [answer.tokens for answer in Generator(reasoner, SETTINGS, source())(prompts, context).answers]
            for reasoner, context in zip((plain, decoding), contexts, strict=True)
        )
        assert found == expected, name
        said.add(str(expected))
    assert len(said) > 3, "what is fed must matter"
