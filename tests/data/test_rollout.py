"""The layout of stage 2: every token has a column, chunks and slots stand where the rollout takes them from."""

from __future__ import annotations

import pytest
import torch

from ilvr_ds.data.rollout import RolloutLayout
from tests.golden_set import golden_set


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("indices", [[5, 0, 2, 4], [5], [3]])
def test_columns_are_tokens_in_order_by_segment(indices: list[int], side: str) -> None:
    golden = golden_set()
    K = golden.settings["latent_size"]
    tokens = (micro := golden.free_window(indices, len(indices), side).micro_batches[0]).tokens
    layout = micro.rollout
    assert layout is not None
    assert layout.rounds == max(len(golden.encoded[i].segments) for i in indices)
    assert layout.source.shape[1] == sum(layout.chunks) + layout.rounds * K
    assert int(layout.real.sum()) == int(tokens.real.sum())
    flat = tokens.input_ids.flatten()
    pad, start = golden.encoder.special.latent_pad, golden.encoder.special.latent_start
    for row, i in enumerate(indices):
        columns = layout.place[row][tokens.real[row]]
        assert bool((columns.diff() > 0).all()), "a row's tokens stay in order"
        assert flat[layout.source[row, columns]].tolist() == golden.encoded[i].input_ids.tolist()
        first = 0
        for m, length in enumerate(layout.chunks[:-1]):
            slots = slice(first + length, first + length + K)
            has_segment = m < len(golden.encoded[i].segments)
            assert layout.real[row, slots].tolist() == [has_segment] * K
            if has_segment:
                assert flat[layout.source[row, slots]].tolist() == [pad] * K
                assert int(flat[layout.source[row, first + layout.openings[m, row]]]) == start
            first += length + K


def test_more_rounds_are_empty() -> None:
    """What a rank adds to stay in step with others changes no column of its own."""
    golden = golden_set()
    layout = golden.free_window([5, 4], 2).micro_batches[0].rollout
    assert layout is not None
    longer = layout.with_rounds(layout.rounds + 2, 3)
    U = layout.source.shape[1]
    assert longer.rounds == layout.rounds + 2
    assert longer.source.shape == (2, U + 2 * 4) == longer.real.shape
    assert not bool(longer.real[:, U:].any())
    assert torch.equal(longer.source[:, :U], layout.source)
    assert longer.openings.shape == (layout.rounds + 2, 2)
    assert isinstance(layout.with_rounds(layout.rounds, 3), RolloutLayout)


def test_stage_2_looks_at_no_helper_image() -> None:
    golden = golden_set()
    window = golden.free_window([0, 3], 2)
    inputs = sum(golden.encoded[i].num_input_images for i in (0, 3))
    assert len(window.images[0].cu_seqlens) == inputs + 1
    assert len(window.candidates.rows) == len(window.micro_batches[0].segments) == 0
