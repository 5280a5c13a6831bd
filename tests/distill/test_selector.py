"""Targets of what changed without a teacher: the same as with one, wherever anything changed."""

from __future__ import annotations

import dataclasses
from typing import Literal

import pytest
import torch
from torch import Tensor

from ilvr_ds.config import Compare, SelectionConfig
from ilvr_ds.data.template import EncodedSample
from ilvr_ds.data.window import Window
from ilvr_ds.distill.query import Context
from ilvr_ds.distill.selection import Targets
from ilvr_ds.distill.selector import Selector
from tests.data.handmade import K, encoded_sample, feature_names, window_of
from tests.data.test_candidates import ORDER, SAMPLES, SQUARE
from tests.distill.test_pool import D, feature, with_stored_features
from tests.ops.native import DEVICES

BY_CHANGE = SelectionConfig(pool="changed", by="change")
NOTHING_BEFORE = (1, 0)
"""The segment of SAMPLES without a picture before it"""
DIFFER = ((0, 0), (0, 1), (1, 1), (2, 0), (3, 0), (3, 1), (4, 0))
"""Segments in which a patch differs from all pictures before: first ones, behind another helper image, other grids"""


def features_of(window: Window, more: int = 0) -> Tensor:
    """By name, as a tower without context would give them, with `more` columns behind as Qwen3-VL's rows have."""
    if window.features is not None:
        rows = window.features
    else:
        rows = torch.stack([feature(*name) for name in feature_names(window.images)])
    return torch.cat([rows, torch.ones(len(rows), more, dtype=rows.dtype)], dim=1)


def selected(
    window: Window, settings: SelectionConfig, seed: int | None = None, more: int = 0, device: str = "cpu"
) -> Targets:
    """seed: of the context that a teacher might have read; None: there is no teacher."""
    context = None
    if seed is not None:
        M, W = len(window.context.sample), len(window.context.prompt)
        drawn = torch.Generator().manual_seed(seed)
        parts = (torch.randn(count, D, generator=drawn).to(device) for count in (W, M))
        context = Context(*parts, has_step=torch.ones(M, dtype=torch.bool, device=device))
    return Selector(settings, K, D)(window.to(torch.device(device)), features_of(window, more).to(device), context)


@pytest.mark.parametrize("compare", ["place", "nearest"])
@pytest.mark.parametrize("order", ["score", "place"])
@pytest.mark.parametrize("is_stored", [False, True], ids=["tower", "stored"])
@pytest.mark.parametrize(("top_p", "temperature"), [(1.0, 1.0), (0.6, 0.05)])
@pytest.mark.parametrize("device", DEVICES)
def test_what_changed_has_the_same_targets_with_and_without_a_teacher(
    compare: Compare, order: Literal["score", "place"], is_stored: bool, top_p: float, temperature: float, device: str
) -> None:
    """To the last bit, for first pictures, grids that differ, several input images and samples of unequal length; and
    whatever the teacher read: catches a part of the selection that the query decides all the same."""
    samples = [with_stored_features(s) for s in SAMPLES] if is_stored else SAMPLES
    window = window_of(samples, 6, "packed", pool="changed", compare=compare)
    settings = dataclasses.replace(BY_CHANGE, compare=compare, order=order, top_p=top_p, temperature=temperature)
    without = selected(window, dataclasses.replace(settings, unchanged="none"), device=device)
    assert without.pool is not None and without.pool.unchanged is not None and without.query is None
    changed = ~without.pool.unchanged
    still = {segment for segment, is_changed in zip(ORDER, changed.tolist(), strict=True) if not is_changed}
    assert NOTHING_BEFORE in still and still.isdisjoint(DIFFER)
    for seed in (0, 1):
        taught = selected(window, settings, seed, device=device)
        assert torch.equal(without.candidates, taught.candidates) and torch.equal(without.offsets, taught.offsets)
        for name in ("indices", "kept", "entropy"):
            assert torch.equal(getattr(without, name)[changed], getattr(taught, name)[changed]), name
        assert (taught.kept[~changed] > 0).all() and (without.kept[changed] > 0).all()


@pytest.mark.parametrize("device", DEVICES)
def test_a_picture_that_does_not_differ_has_no_target(device: str) -> None:
    """A repeated picture, and a first one: no slot, nobody in the pool, and no number that is not one."""
    again = encoded_sample(6, inputs=(SQUARE,), helpers=(SQUARE, SQUARE))
    first, *rest = again.patches
    again = dataclasses.replace(again, patches=(first, first, *rest[1:]))
    samples: list[EncodedSample] = [again, SAMPLES[1]]
    window = window_of(samples, 2, "packed", pool="changed")
    found = selected(window, dataclasses.replace(BY_CHANGE, unchanged="none"), device=device)
    assert found.pool is not None and found.pool.unchanged is not None
    assert found.pool.unchanged.tolist() == [True, True, False, False], "first segments come first"
    still, moved = slice(0, int(found.offsets[2])), slice(int(found.offsets[2]), None)
    assert not found.pool.members[still].any() and found.pool.members[moved].any()
    assert found.indices[:2].tolist() == [[-1] * K] * 2 and found.kept[:2].tolist() == [0, 0]
    assert found.entropy[:2].tolist() == [0, 0] and (found.kept[2:] > 0).all()
    micro = found.of(window.to(torch.device(device)).micro_batches[0])
    assert (micro.indices >= 0).sum() == found.kept.sum() and micro.query is None


def test_features_behind_those_of_the_last_block_do_not_count() -> None:
    """Qwen3-VL's rows hold features of earlier blocks too."""
    window = window_of(SAMPLES, 6, "packed", pool="changed")
    settings = dataclasses.replace(BY_CHANGE, unchanged="none")
    narrow, wide = selected(window, settings), selected(window, settings, more=5)
    assert wide.candidates.shape[1] == D and torch.equal(wide.candidates, narrow.candidates)
    assert torch.equal(wide.indices, narrow.indices)
