from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from ilvr_ds.evaluation.ablation import CONDITIONS, latent_source
from ilvr_ds.generation.context import Context
from ilvr_ds.generation.generate import Generator
from ilvr_ds.generation.latent_sources import OtherSample
from ilvr_ds.generation.row_modes import Place
from ilvr_ds.generation.settings import GenerationSettings

if TYPE_CHECKING:
    from ilvr_ds.generation.loading import Reasoner
    from tests.golden_set import GoldenSet


def test_each_condition_feeds_what_its_name_says(golden: GoldenSet, reasoner: Reasoner) -> None:
    prompts = [reasoner.encoder.prompt(sample) for sample in golden.samples[:3]]
    start = reasoner.special.latent_start
    settings = GenerationSettings(max_new_tokens=30, forced={2: start, 20: start}, keep_latents=True)
    own = Generator(reasoner, settings)(prompts).answers
    K, pad = reasoner.latent_size, reasoner.model.get_input_embeddings().weight[reasoner.special.latent_pad]
    fed = {}
    read = Context(reasoner, prompts, settings.max_new_tokens)
    for condition in CONDITIONS:
        answers = Generator(reasoner, settings, latent_source(condition, reasoner, own, seed=1))(prompts).answers
        again = Generator(reasoner, settings, latent_source(condition, reasoner, own, seed=1))(prompts, read).answers
        assert [answer.tokens for answer in again] == [answer.tokens for answer in answers], "prompts read once"
        fed[condition] = answers
    for row, answer in enumerate(own):
        assert torch.count_nonzero(fed["zeros"][row].latents[0]) == 0
        assert torch.equal(fed["pad_embedding"][row].latents[0], pad.expand(K, -1))
        donor = own[(row + 1) % 3]
        assert torch.equal(fed["other_sample"][row].latents[0], donor.latents[0])
        assert fed["markers"][row].steps[:1] == (0,) and fed["markers"][row].latents[0].numel() == 0
        noise = fed["noise"][row].latents[0]
        # the state that the first step replaces is that of the own run: nothing differed before it
        torch.testing.assert_close(noise[0].norm(), answer.latents[0][0].norm())
        assert abs(torch.cosine_similarity(noise[0], answer.latents[0][0], dim=0)) < 0.6
    assert not torch.equal(fed["noise"][0].latents[0][0], fed["noise"][1].latents[0][0])
    assert not torch.equal(fed["noise"][0].latents[0][0], fed["noise"][0].latents[0][1])


def test_a_row_without_a_donor_keeps_its_own_states(golden: GoldenSet, reasoner: Reasoner) -> None:
    prompts = [reasoner.encoder.prompt(sample) for sample in golden.samples[:2]]
    silent = GenerationSettings(max_new_tokens=3, forbidden=(reasoner.special.latent_start,), keep_latents=True)
    source = OtherSample(Generator(reasoner, silent)(prompts).answers, reasoner.latent_size, reasoner.device)
    assert source.has_donor == [False, False]
    hidden = torch.randn(2, 64)
    zeros = torch.zeros(2, dtype=torch.int64)
    assert torch.equal(source(hidden, Place(zeros, zeros)), hidden)
