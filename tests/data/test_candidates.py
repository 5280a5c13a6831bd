"""Pools of handmade samples: every index is followed to the patches that it should point at."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from ilvr_ds.config import Compare
from ilvr_ds.data.images import Grid
from ilvr_ds.data.template import EncodedSample
from ilvr_ds.data.window import Window
from tests.data.handmade import encoded_sample, feature_names, leaves, window_of

SQUARE, WIDE, LONG = (4, 4), (4, 6), (4, 12)  # 4, 6 and 12 merged patches, of which 4 groups at most
SAMPLES = [
    encoded_sample(0, inputs=(SQUARE,), helpers=(SQUARE, SQUARE, WIDE, WIDE, SQUARE)),
    encoded_sample(1, helpers=(SQUARE, SQUARE)),
    encoded_sample(2, inputs=(SQUARE, WIDE, SQUARE), helpers=(SQUARE,)),
    encoded_sample(3, inputs=(LONG,), helpers=(LONG, WIDE)),
    encoded_sample(4, inputs=(WIDE,), helpers=(SQUARE,)),
    encoded_sample(5),
]
ORDER = [(i, m) for m in range(5) for i, s in enumerate(SAMPLES) if m < len(s.grids) - s.num_input_images]
Name = frozenset[tuple[int, int]]
"""The patches of a candidate, each as (image, merged patch)."""


def groups(image: int, grid: Grid) -> list[Name]:
    """The candidates of an image."""
    count = grid[0] * grid[1] // 4
    run = max(1, count // 4)
    return [frozenset((image, n * run + r) for r in range(run)) for n in range(min(count, 4))]


def earlier_table(window: Window) -> list[Name]:
    """The names of its rows."""
    names = feature_names(window.images)
    where = window.candidates
    assert where.before is not None
    parts = [(where.rows, where.weights), (where.before.input_rows, where.before.input_weights)]
    return [
        frozenset(names[row] for row, weight in zip(run, shares, strict=True) if weight)
        for rows, weights in parts
        for run, shares in zip(rows.tolist(), weights.tolist(), strict=True)
    ]


def wanted(i: int, m: int, compare: Compare) -> tuple[list[set[Name]], set[Name]]:
    """For each candidate what stands at its place before; and all that is searched, where nothing can."""
    sample = SAMPLES[i]
    images = [(groups(10 * i + j, grid), grid) for j, grid in enumerate(sample.grids)]
    shown, done = images[: sample.num_input_images], images[sample.num_input_images :][:m]
    mine, grid = images[sample.num_input_images + m]
    same = [names for names, other in (done[-1:] or shown) if other == grid and compare == "place"]
    if same:
        return [set(places) for places in zip(*same, strict=True)], set()
    return [{name} for name in mine], {name for names, _ in shown + done for name in names}


@pytest.mark.parametrize(("compare", "count"), [("place", 4), ("nearest", 10)])
@pytest.mark.parametrize("rows", ["packed", "right", "left"])
@pytest.mark.parametrize("micro", [1, 2, 6])
def test_the_pictures_before_are_found_in_any_layout(rows: str, micro: int, compare: Compare, count: int) -> None:
    window = window_of(SAMPLES, micro, rows, pool="changed", compare=compare)
    before, offsets = window.candidates.before, window.candidates.offsets.tolist()
    assert before is not None
    table = earlier_table(window)
    searched = {(s.first, s.last): before.earlier[s.start : s.stop].tolist() for s in before.searches}
    for (i, m), first, last in zip(ORDER, offsets[:-1], offsets[1:], strict=True):
        places, pictures = wanted(i, m, compare)
        assert [{table[row] for row in row_set} for row_set in before.place[first:last].tolist()] == places, (i, m)
        found = searched.get((first, last), [])
        assert {table[row] for row in found} == pictures and len(found) == len(pictures), (i, m)
    assert len(before.searches) == count


def test_a_first_picture_without_an_image_has_nothing_before_it() -> None:
    """Its candidates stand for themselves: none of them changed."""
    window = window_of([SAMPLES[1]], 1, pool="changed")
    assert window.candidates.before is not None and window.candidates.before.searches == ()
    assert window.candidates.before.place.tolist() == [[n] for n in [0, 1, 2, 3, 0, 1, 2, 3]]


@pytest.mark.parametrize("pool", ["changed", "region"])
def test_a_window_without_segments_has_empty_pools(pool: str) -> None:
    where = window_of([SAMPLES[5], SAMPLES[5]], 1, pool=pool).candidates
    if pool == "region":
        assert where.in_region is not None and where.in_region.shape == (0,)
    else:
        assert where.before is not None and where.before.searches == ()
        assert where.before.place.shape == where.before.input_rows.shape == (0, 1)


def with_regions(sample: EncodedSample, *regions: tuple[float, float, float, float]) -> EncodedSample:
    return dataclasses.replace(sample, regions=regions)


@pytest.mark.parametrize(
    ("region", "cells"),
    [
        ((0, 0, 1, 1), [0, 1, 2, 3, 4, 5]),
        ((0, 0, 1 / 3, 1 / 2), [0]),
        ((1 / 3, 1 / 2, 1, 1), [4, 5]),
        ((0.3, 0.4, 0.7, 0.6), [4]),  # no middle of a row: the row around 0.5, the lower one
        ((0.34, 0.1, 0.4, 0.2), [1]),
        ((0.9, 0.9, 1, 1), [5]),
        ((0, 0.4, 1, 0.45), [0, 1, 2]),
    ],
)
def test_a_region_is_the_cells_whose_middle_lies_in_it_or_the_one_around_it(region, cells) -> None:  # type: ignore[no-untyped-def]
    """On 2 rows of 3 merged patches."""
    sample = with_regions(encoded_sample(0, helpers=(WIDE,)), region)
    where = window_of([sample], 1, group_size=256, pool="region").candidates
    assert where.in_region is not None
    assert where.in_region.nonzero()[:, 0].tolist() == cells


@pytest.mark.parametrize(
    ("region", "groups"), [((0, 0, 1 / 6, 1), [0, 2]), ((0, 0, 1, 0.5), [0, 1]), ((5 / 6, 0.5, 1, 1), [3])]
)
def test_a_candidate_is_in_a_region_where_one_of_its_patches_is(region, groups) -> None:  # type: ignore[no-untyped-def]
    """12 merged patches in 2 rows, 4 candidates of 3 each."""
    sample = with_regions(encoded_sample(0, helpers=(LONG,)), region)
    where = window_of([sample], 1, pool="region").candidates
    assert where.in_region is not None
    assert where.in_region.nonzero()[:, 0].tolist() == groups


def test_a_region_in_what_grouping_drops_is_its_last_candidate() -> None:
    """6 merged patches, of which the last two belong to no candidate."""
    sample = with_regions(encoded_sample(0, helpers=(WIDE,)), (0.7, 0.6, 1, 1))
    where = window_of([sample], 1, pool="region").candidates
    assert where.in_region is not None and where.in_region.tolist() == [False, False, False, True]


def test_regions_belong_to_their_segments_in_any_layout() -> None:
    rng = np.random.default_rng(0)

    def box() -> tuple[float, float, float, float]:
        left, right = np.sort(rng.random(2)).tolist()
        top, bottom = np.sort(rng.random(2)).tolist()
        return left, top, right, bottom

    samples = [with_regions(s, *[box() for _ in s.segments]) for s in SAMPLES]

    def by_segment(window: Window) -> dict[Name, bool]:
        table = feature_names(window.images)
        names = [
            frozenset(table[row] for row, weight in zip(run, shares, strict=True) if weight)
            for run, shares in zip(window.candidates.rows.tolist(), window.candidates.weights.tolist(), strict=True)
        ]
        assert window.candidates.in_region is not None
        return dict(zip(names, window.candidates.in_region.tolist(), strict=True))

    whole = by_segment(window_of(samples, 6, "packed", pool="region"))
    assert by_segment(window_of(samples, 2, pool="region")) == whole
    parts = [by_segment(window_of(part, 1, pool="region")) for part in (samples[:2], samples[2:])]
    assert parts[0] | parts[1] == whole


def test_a_segment_without_a_region_leaves_none() -> None:
    samples = [with_regions(s, *[(0, 0, 1, 1)] * len(s.segments)) for s in SAMPLES]
    assert window_of(samples, 1, pool="region").candidates.in_region is not None
    samples[3] = dataclasses.replace(samples[3], regions=(None, (0, 0, 1, 1)))
    assert window_of(samples, 1, pool="region").candidates.in_region is None


@pytest.mark.parametrize("samples", [SAMPLES, [SAMPLES[5]]], ids=["mixed", "text alone"])
def test_indices_are_int64_and_move_to_a_device(samples: list[EncodedSample]) -> None:
    where = window_of(samples, 1, pool="changed").candidates
    for name, tensor in leaves(where):
        assert tensor.dtype == (torch.float32 if "weights" in name else torch.int64), name
    assert all(tensor.is_meta for _, tensor in leaves(where.to(torch.device("meta"))))
