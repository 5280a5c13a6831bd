"""Pools from features: against a loop, in every layout, and of the demo's pictures through reader and tower."""

from __future__ import annotations

import dataclasses
import json
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from ilvr_ds.config import Recipe, SelectionConfig, load_recipe
from ilvr_ds.data.loader import WindowDataset
from ilvr_ds.data.shards import open_dataset
from ilvr_ds.data.template import EncodedSample
from ilvr_ds.data.window import Window
from ilvr_ds.distill.pool import ChoicePool, find_pool
from ilvr_ds.distill.query import Context
from ilvr_ds.distill.selection import select_targets
from ilvr_ds.errors import UserError
from ilvr_ds.ingest.pack import pack
from ilvr_ds.model.encoding import build_dataset, build_encoding
from ilvr_ds.model.tower import load_tower
from ilvr_ds.ops.reference import pool_candidates
from ilvr_ds.training.assembly.inputs import Inputs
from tests.data.handmade import feature_names, window_of
from tests.data.test_candidates import ORDER, SAMPLES, groups, wanted
from tests.ops import loops
from tests.recipes import RECIPE

D, K = 16, 2
CHANGED = SelectionConfig(pool="changed")


def feature(image: int, patch: int) -> Tensor:
    """Bf16, so that stored rows are the same; helper images of a sample resemble each other but for one patch."""
    like = image // 10 * 10
    drawn = torch.randn(D, generator=torch.Generator().manual_seed(100 * like + patch))
    if patch == image % 10 and image % 10:
        drawn = torch.randn(D, generator=torch.Generator().manual_seed(10_000 + image))
    return drawn.bfloat16()


def with_stored_features(sample: EncodedSample) -> EncodedSample:
    """The sample as the loader makes it where features are stored."""
    name = int(sample.id[-1])
    rows = [feature(10 * name + j, patch) for j, (h, w) in enumerate(sample.grids) for patch in range(h * w // 4)]
    table = torch.stack(rows) if rows else torch.empty(0, D, dtype=torch.bfloat16)
    return dataclasses.replace(sample, patches=(), features=table.view(torch.int16).numpy().view(np.uint16))


def pool_of(window: Window) -> tuple[Tensor, ChoicePool]:
    """Candidates and pool; features are given by name, as a tower without context would."""
    if window.features is not None:
        features = window.features
    else:
        features = torch.stack([feature(*name) for name in feature_names(window.images)])
    where = window.candidates
    candidates = pool_candidates(features, where.rows, where.weights)
    pool = find_pool(features, where, candidates, CHANGED, K)
    assert pool is not None
    return candidates, pool


def by_segment(window: Window) -> dict[tuple[str, int], list[Tensor]]:
    """Change, membership and what stands out, of each segment of each sample."""
    _, pool = pool_of(window)
    assert pool.change is not None and pool.stands_out is not None and pool.unchanged is not None
    found: dict[tuple[str, int], list[Tensor]] = {}
    offsets = window.candidates.offsets
    for micro in window.micro_batches:
        for w, b, m in zip(micro.segments, micro.sample_of_segment, micro.noise_keys[:, 1].tolist(), strict=True):
            here = slice(int(offsets[w]), int(offsets[w + 1]))
            parts = (pool.change, pool.members, pool.stands_out)
            found[micro.ids[int(b)], m] = [*(part[here] for part in parts), pool.unchanged[w]]
    return found


def test_change_is_what_a_loop_over_pictures_says() -> None:
    found = by_segment(window_of(SAMPLES, 2, pool="changed"))
    assert len(found) == len(ORDER)

    def mean(names: frozenset[tuple[int, int]]) -> Tensor:
        return torch.stack([feature(*name).double() for name in names]).mean(0).bfloat16()

    for i, m in ORDER:
        places, pictures = wanted(i, m, "place")
        mine = groups(10 * i + SAMPLES[i].num_input_images + m, SAMPLES[i].grids[SAMPLES[i].num_input_images + m])
        expected = [
            1 - max(loops.cosine(mean(name), mean(other)) for other in (pictures or place))
            for name, place in zip(mine, places, strict=True)
        ]
        # a mean of patches is rounded to bf16 once here and there
        assert found[f"id-{i}", m][0].tolist() == pytest.approx(expected, abs=1e-2 if m < 2 and i == 3 else 1e-5)
    assert bool(found["id-1", 0][3]) and found["id-1", 0][1].all(), "nothing was before it"
    assert not bool(found["id-1", 1][3])


@pytest.mark.parametrize("rows", ["packed", "left"])
@pytest.mark.parametrize("micro", [1, 3])
@pytest.mark.parametrize("is_stored", [False, True], ids=["tower", "stored"])
def test_pools_do_not_depend_on_the_layout(rows: str, micro: int, is_stored: bool) -> None:
    """Neither on micro-batches and padding nor on what else a rank has in its window, to the last bit."""
    samples = [with_stored_features(s) for s in SAMPLES] if is_stored else SAMPLES
    whole = by_segment(window_of(SAMPLES, 6, "packed", pool="changed"))
    other = by_segment(window_of(samples, micro, rows, pool="changed"))
    on_ranks = [by_segment(window_of(part, 1, rows, pool="changed")) for part in (samples[:1], samples[1:])]
    for found in (other, on_ranks[0] | on_ranks[1]):
        assert found.keys() == whole.keys()
        for segment, parts in whole.items():
            assert all(map(torch.equal, found[segment], parts)), segment


def demo_windows(demo: Path, *overrides: str) -> tuple[Recipe, WindowDataset]:
    recipe = load_recipe(RECIPE, [f"model.path={demo / 'model'}", f"data.shards={demo / 'train'}", *overrides])
    encoding, shards = build_encoding(recipe), open_dataset(recipe.data.shards)
    return recipe, build_dataset(recipe, encoding, shards, lambda _: [np.arange(32)])


def cells_that_differ(before: np.ndarray, after: np.ndarray) -> set[int]:
    """Merged patches, 28 x 28 pixels, that are not the same in both pictures."""
    rows, columns = after.shape[0] // 28, after.shape[1] // 28
    tiles = (before != after).any(-1).reshape(rows, 28, columns, 28).any((1, 3))
    return set(np.flatnonzero(tiles).tolist())


@pytest.mark.parametrize("by", ["query", "change"])
def test_what_changes_in_the_demos_pictures_is_found(demo_folder: Path, by: str) -> None:
    """Through shards, reader, collation and the tiny model's tower, whose attention passes each change on."""
    recipe, dataset = demo_windows(demo_folder, "selection.pool=changed", f"selection.by={by}")
    window = dataset[0]
    tower = load_tower(recipe.model, dataset.encoder.images, torch.float32, torch.device("cpu"))
    features, k = tower.features(window), recipe.model.latent_size
    where = window.candidates
    candidates = pool_candidates(features, where.rows, where.weights)
    pool = find_pool(features, where, candidates, recipe.selection, k)
    M, D = len(window.context.sample), candidates.shape[1]
    generator = torch.Generator().manual_seed(0)
    context = Context(torch.randn(32, D, generator=generator), torch.zeros(M, D), torch.zeros(M, dtype=torch.bool))
    targets = select_targets(context, window.context, candidates, where.offsets, recipe.selection, k, pool)
    assert pool is not None and pool.stands_out is not None
    found = missed = chosen_wrongly = pictures = 0
    numbers = {segment: w for w, segment in enumerate(_order(window))}
    for b in range(32):
        sample = dataset.reader.read(b)
        seen = [np.asarray(dataset.encoder.images.seen(data)) for data in (*sample.input_images, *sample.helper_images)]
        for m, (before, after) in enumerate(pairwise(seen)):
            if before.shape != after.shape:
                continue
            w = numbers[b, m]
            first, last = where.offsets[w : w + 2].tolist()
            changed = cells_that_differ(before, after)
            members = set(pool.members[first:last].nonzero()[:, 0].tolist())
            picked = {n - first for n in targets.indices[w].tolist() if n >= 0}
            assert picked <= members
            pictures += 1
            if 0 < len(changed) <= recipe.selection.pool_limit(k):
                found += len(changed & members)
                missed += len(changed - members)
                chosen_wrongly += len(picked - changed) if by == "change" and len(changed) >= k else 0
    assert pictures > 20 and found > 40
    assert missed == 0
    assert chosen_wrongly == 0


def _order(window: Window) -> list[tuple[int, int]]:
    """(sample, number in the sample) of each segment."""
    seen: dict[int, int] = {}
    order = []
    for sample in window.context.sample.tolist():
        order.append((sample, seen.get(sample, 0)))
        seen[sample] = seen.get(sample, 0) + 1
    return order


def test_regions_travel_from_the_records_to_the_selection(demo_folder: Path, tmp_path: Path) -> None:
    """Catches boxes of another step, pixels of another size than the tower's, and rows and columns mixed up."""
    records = [json.loads(line) for line in (demo_folder / "task/train.jsonl").read_text().splitlines()[:4]]
    boxes: dict[tuple[int, int], list[int]] = {}
    for i, record in enumerate(records):
        for m, step in enumerate(s for s in record["sequence_plan"] if s["type"] == "latent"):
            column, row = (i + m) % 2, m % 2
            boxes[i, m] = [28 * column, 28 * row, 28 * column + 28, 28 * row + 28]
            step["region"] = boxes[i, m]
    (tmp_path / "with.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    pack(tmp_path / "with.jsonl", demo_folder / "task", tmp_path / "packed")
    recipe, _ = demo_windows(demo_folder, "selection.pool=region")
    shards = open_dataset(tmp_path / "packed")
    shards.check_regions()
    window = build_dataset(recipe, build_encoding(recipe), shards, lambda _: [np.arange(4)])[0]
    where, k = window.candidates, recipe.model.latent_size
    candidates = torch.randn(len(where.rows), D, generator=torch.Generator().manual_seed(1))
    pool = find_pool(candidates, where, candidates, recipe.selection, k)
    M = len(window.context.sample)
    context = Context(torch.ones(4, D), torch.zeros(M, D), torch.zeros(M, dtype=torch.bool))
    targets = select_targets(context, window.context, candidates, where.offsets, recipe.selection, k, pool)
    assert len(boxes) == M and (targets.kept == 1).all()
    for w, (i, m) in enumerate(_order(window)):
        grid = _columns(records[i], m, demo_folder / "task")
        left, top, *_ = boxes[i, m]
        assert int(targets.indices[w, 0] - where.offsets[w]) == top // 28 * grid + left // 28


def _columns(record: dict[str, object], m: int, root: Path) -> int:
    from PIL import Image

    steps = [step for step in record["sequence_plan"] if step["type"] == "latent"]  # type: ignore[attr-defined]
    return Image.open(root / steps[m]["helper_image"]).width // 28


def test_data_without_regions_are_refused_in_one_line(demo_folder: Path) -> None:
    recipe, _ = demo_windows(demo_folder, "selection.pool=region")
    unevaluated = dataclasses.replace(recipe.data, eval_shards=None)
    with pytest.raises(UserError, match=r"selection.pool is region, which every latent step .* no sample"):
        Inputs.read(recipe, Path(RECIPE), 1)
    assert Inputs.read(dataclasses.replace(recipe, selection=SelectionConfig(), data=unevaluated), Path(RECIPE), 1)
