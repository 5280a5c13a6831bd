"""Images and latents written into sequences, and padding that changes nothing."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from ilvr_ds.data.window import TokenBatch
from ilvr_ds.model.injection import last_hidden, write_images, write_latents
from ilvr_ds.model.layers.attention import use_packed_attention
from tests.golden_set import GoldenSet

RAGGED = [0, 1, 4, 5]
"""Golden samples of 115, 128, 99 and 82 tokens, with 1, 2, 1 and 1 images."""


def tokens_of(image_slots: list[int], image_rows: list[int]) -> TokenBatch:
    """Two sequences of three tokens."""
    ids = torch.zeros(2, 3, dtype=torch.int64)
    slots, rows = (torch.tensor(values, dtype=torch.int64) for values in (image_slots, image_rows))
    return TokenBatch(ids, ids.expand(3, 2, 3), ids == 0, slots, rows)


def test_images_are_written_at_their_positions_and_nowhere_else() -> None:
    embeddings = torch.arange(12.0).view(2, 3, 2)
    before = embeddings.clone()
    features = torch.tensor([[100.0, 101], [110, 111], [120, 121]])
    written = write_images(embeddings, tokens_of([1, 5], [2, 0]), features)
    assert written[0, 1].tolist() == [120, 121] and written[1, 2].tolist() == [100, 101]
    kept = torch.tensor([[True, False, True], [True, True, False]])
    assert torch.equal(written[kept], before[kept])
    assert torch.equal(embeddings, before), "not in place: the embedding's gradient needs the old values"


def test_without_images_the_embeddings_stay() -> None:
    embeddings = torch.randn(2, 3, 2)
    assert torch.equal(write_images(embeddings, tokens_of([], []), torch.ones(4, 2)), embeddings)


def test_features_take_the_embeddings_precision() -> None:
    written = write_images(torch.zeros(2, 3, 2).bfloat16(), tokens_of([0], [0]), torch.full((1, 2), 1 / 3))
    assert written.dtype == torch.bfloat16 and written[0, 0, 0] == torch.tensor(1 / 3).bfloat16()


def test_written_positions_get_no_gradient_of_the_embedding() -> None:
    embeddings = torch.randn(2, 3, 2, requires_grad=True)
    write_images(embeddings, tokens_of([1, 5], [0, 0]), torch.ones(1, 2)).sum().backward()
    assert embeddings.grad[..., 0].tolist() == [[1, 0, 1], [1, 1, 0]]


def test_latents_are_written_where_set_and_pads_kept_elsewhere() -> None:
    embeddings = torch.arange(12.0).view(2, 3, 2)
    before = embeddings.clone()
    slots, values = torch.tensor([[4, 5], [0, 1]]), -1 - torch.arange(8.0).view(2, 2, 2)
    written = write_latents(embeddings, slots, values, torch.tensor([[True, False], [True, True]]))
    flat = written.flatten(0, 1)
    assert flat[[4, 0, 1]].tolist() == [[-1, -2], [-5, -6], [-7, -8]]
    assert torch.equal(flat[[2, 3, 5]], before.flatten(0, 1)[[2, 3, 5]])
    assert torch.equal(embeddings, before)


def test_gradients_go_to_the_latents_that_are_set_and_to_the_pads_that_are_kept() -> None:
    embeddings, values = torch.randn(1, 3, 2, requires_grad=True), torch.randn(1, 2, 2, requires_grad=True)
    write_latents(embeddings, torch.tensor([[1, 2]]), values, torch.tensor([[True, False]])).sum().backward()
    assert embeddings.grad[0, :, 0].tolist() == [1, 0, 1] and values.grad[0, :, 0].tolist() == [1, 0]


def test_an_arbitrary_value_that_is_not_set_leaves_no_trace() -> None:
    values = torch.full((1, 2, 2), torch.nan)
    embeddings = torch.randn(1, 3, 2, requires_grad=True)
    written = write_latents(embeddings, torch.tensor([[1, 2]]), values, torch.zeros(1, 2, dtype=torch.bool))
    written.sum().backward()
    assert torch.equal(written, embeddings) and (embeddings.grad == 1).all()


def test_without_segments_the_embeddings_stay() -> None:
    embeddings = torch.randn(2, 3, 2)
    none = torch.empty(0, 4, dtype=torch.int64)
    assert torch.equal(write_latents(embeddings, none, torch.empty(0, 4, 2), none.bool()), embeddings)


class Recorder:
    """Stands for a language model and keeps the mask that it is given."""

    def __init__(self, attention: str) -> None:
        self.config = SimpleNamespace(model_type="qwen2_5_vl_text", _attn_implementation=attention)

    def __call__(self, *, attention_mask: dict[str, Any], inputs_embeds: torch.Tensor, **_: Any) -> Any:
        self.mask = attention_mask["full_attention"]
        return SimpleNamespace(last_hidden_state=inputs_embeds)


def mask_of(attention: str, right_padded: bool) -> Any:
    """The mask for two sequences of three tokens, of which the second has two tokens of padding in front."""
    real = torch.tensor([[True, True, True], [False, False, True]])
    model = Recorder(attention)
    last_hidden(model, replace(tokens_of([], []), real=real, right_padded=right_padded), torch.zeros(2, 3, 2))
    return model.mask


@pytest.mark.parametrize("attention", ["sdpa", "flash_attention_2"])
def test_padding_behind_the_text_needs_no_mask(attention: str) -> None:
    assert mask_of(attention, right_padded=True) is None


def test_no_row_of_the_mask_is_empty() -> None:
    """Softmax over nothing is NaN in some kernels, and reaches the gradients of every weight."""
    mask = mask_of("sdpa", right_padded=False)
    assert mask[0, 0].int().tolist() == [[1, 0, 0], [1, 1, 0], [1, 1, 1]]
    assert mask[1, 0].int().tolist() == [[1, 0, 0], [0, 1, 0], [0, 0, 1]]


def test_flash_attention_gets_the_real_tokens() -> None:
    assert mask_of("flash_attention_2", right_padded=False).int().tolist() == [[1, 1, 1], [0, 0, 1]]


def hidden_of(batch: TokenBatch, stock: Any, features: torch.Tensor) -> torch.Tensor:
    model = stock.model.language_model
    with torch.no_grad():
        return last_hidden(model, batch, write_images(model.embed_tokens(batch.input_ids), batch, features))


@pytest.mark.parametrize("side", ["right", "left"])
def test_a_padded_sequence_has_the_hidden_states_of_the_sequence_alone(
    side: str, golden: GoldenSet, stock: Any, tower: Any
) -> None:
    """Against the stock model, sample by sample, without padding, with pixel positions of its own."""
    window = golden.window(RAGGED, len(RAGGED), side)
    features = tower(window.images[0])
    hidden = hidden_of(window.tokens, stock, features)
    assert hidden.isfinite().all(), "padding too: a NaN there would reach the weights' gradients"
    for b, i in enumerate(RAGGED):
        alone = golden.window([i], 1)
        ids = alone.tokens.input_ids
        is_image = ids == golden.encoder.special.image_pad
        embeddings = stock.get_input_embeddings()(ids)
        grids = torch.tensor([(1, *grid) for grid in golden.encoded[i].grids[: golden.encoded[i].num_input_images]])
        positions, _ = stock.model.get_rope_index(ids, mm_token_type_ids=is_image.int(), image_grid_thw=grids)
        embeddings = embeddings.masked_scatter(
            is_image[..., None], features[window.tokens.image_rows[_mine(window, b)]]
        )
        with torch.no_grad():
            wanted = stock.model.language_model(inputs_embeds=embeddings, position_ids=positions, use_cache=False)
        # float32 through three layers; a masked and an unmasked kernel add up in another order
        torch.testing.assert_close(hidden[b][window.tokens.real[b]], wanted.last_hidden_state[0], atol=1e-5, rtol=1e-4)


def test_a_packed_sequence_has_the_hidden_states_of_the_sequence_alone(
    golden: GoldenSet, stock: Any, tower: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bitwise but for the order of sums in larger matrix products; with the rotary positions of its own start."""
    config = stock.model.language_model.config
    alone = [golden.window([i], 1, "right") for i in RAGGED]
    wanted = [hidden_of(window.tokens, stock, tower(window.images[0])) for window in alone]
    window = golden.window(RAGGED, len(RAGGED), "packed")
    monkeypatch.setattr(config, "_attn_implementation", config._attn_implementation)
    use_packed_attention(stock.model.language_model, "auto", torch.device("cpu"), torch.float32)
    hidden = hidden_of(window.tokens, stock, tower(window.images[0]))
    assert hidden.shape[:2] == (1, sum(window.tokens.lengths))
    for rows, expected in zip(hidden[0].split(window.tokens.lengths), wanted, strict=True):
        torch.testing.assert_close(rows, expected[0], atol=1e-5, rtol=1e-4)


def test_packed_rows_need_an_attention_that_heeds_their_bounds(golden: GoldenSet, stock: Any, tower: Any) -> None:
    """The stock model would let every sample see those before it, without an error."""
    window = golden.window(RAGGED, len(RAGGED), "packed")
    with pytest.raises(RuntimeError, match="packed rows, but the language model's attention is sdpa"):
        hidden_of(window.tokens, stock, tower(window.images[0]))


def _mine(window: Any, b: int) -> torch.Tensor:
    """Which image slots lie in sequence b."""
    return window.tokens.image_slots // window.tokens.input_ids.shape[1] == b


@pytest.mark.parametrize("side", ["right", "left"])
def test_what_stands_on_padding_does_not_matter(side: str, golden: GoldenSet, stock: Any, tower: Any) -> None:
    window = golden.window(RAGGED, len(RAGGED), side)
    tokens, features = window.tokens, tower(window.images[0])
    noisy = replace(tokens, input_ids=torch.where(tokens.real, tokens.input_ids, 7))
    a, b = hidden_of(tokens, stock, features), hidden_of(noisy, stock, features)
    assert not tokens.real.all() and torch.equal(a[tokens.real], b[tokens.real])


@pytest.mark.parametrize("side", ["right", "left"])
def test_a_token_sees_nothing_behind_it(side: str, golden: GoldenSet, stock: Any, tower: Any) -> None:
    window = golden.window(RAGGED, len(RAGGED), side)
    tokens, features = window.tokens, tower(window.images[0])
    ids = tokens.input_ids.clone()
    last = [int(row.nonzero()[-1]) for row in tokens.real]
    for b, t in enumerate(last):
        ids[b, t - 1] = 7
    changed = hidden_of(replace(tokens, input_ids=ids), stock, features) != hidden_of(tokens, stock, features)
    for b, t in enumerate(last):
        assert not changed[b, tokens.real[b]][:-2].any() and changed[b, t - 1].any() and changed[b, t].any()
