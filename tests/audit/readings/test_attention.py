from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import eager_attention_forward

from ilvr_ds.audit.readings import attention
from ilvr_ds.audit.readings.attention import attention_shares
from ilvr_ds.generation.generate import Generator
from ilvr_ds.generation.settings import GenerationSettings

if TYPE_CHECKING:
    from ilvr_ds.generation.loading import Reasoner
    from tests.golden_set import GoldenSet


def test_shares_are_those_of_eager_attention(
    golden: GoldenSet, reasoner: Reasoner, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches another mask, another scale, the wrong columns, a model that is left with this attention, and scores of
    all pairs of tokens, which at 7B take 40 GB for 10,000 of them."""
    sample = next(sample for sample in golden.samples if sample.input_images)
    prompt, special = reasoner.encoder.prompt(sample), reasoner.special
    settings = GenerationSettings(24, forced={2: special.latent_start}, keep_latents=True)
    [answer] = Generator(reasoner, settings)([prompt]).answers
    eager: list[torch.Tensor] = []
    sizes: list[int] = []
    softmax = torch.Tensor.softmax

    def spying(self: Any, module: Any, query: Any, key: Any, value: Any, mask: Any, **options: Any) -> Any:
        T = query.shape[2]
        later = torch.full((T, T), -torch.inf).triu(1)[None, None]
        _, weights = eager_attention_forward(module, query, key, value, later, scaling=options["scaling"])
        eager.append(weights[0].mean(0))
        with monkeypatch.context() as patch:
            patch.setattr(torch.Tensor, "softmax", measured)
            return own(self, module, query, key, value, mask, **options)

    def measured(logits: torch.Tensor, dim: int) -> torch.Tensor:
        sizes.append(logits.shape[2])
        return softmax(logits, dim)

    own = attention._Shares.__call__
    monkeypatch.setattr(attention._Shares, "__call__", spying)
    before = reasoner.model.model.language_model.config._attn_implementation
    shares = attention_shares(reasoner, prompt, answer)
    assert reasoner.model.model.language_model.config._attn_implementation == before
    assert shares is not None and len(shares) == len(eager) == reasoner.model.config.text_config.num_hidden_layers
    ids = [*prompt.input_ids.tolist(), *answer.tokens]
    first = len(ids) - answer.tokens[::-1].index(special.latent_end)
    assert set(sizes) == {len(ids) - first}
    for layer, weights in zip(shares, eager, strict=True):
        asked = weights[first:].mean(0)
        kinds = [special.latent_pad, special.image_pad]
        expected = [sum(float(asked[at]) for at, token in enumerate(ids) if token == kind) for kind in kinds]
        assert layer[:2] == pytest.approx(expected, abs=1e-5) and sum(layer) == pytest.approx(1, abs=1e-5)
        assert layer[0] > 0 and layer[1] > 0


def test_an_answer_without_words_behind_a_segment_is_not_looked_at(golden: GoldenSet, reasoner: Reasoner) -> None:
    prompt = reasoner.encoder.prompt(golden.samples[0])
    settings = GenerationSettings(6, forbidden=(reasoner.special.latent_start,), keep_latents=True)
    assert attention_shares(reasoner, prompt, Generator(reasoner, settings)([prompt]).answers[0]) is None
