"""Stored features: what was written comes back, whatever differs is refused, whatever is damaged is found."""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ilvr_ds.data import images as images_module
from ilvr_ds.data.decode import decode_image, image_size
from ilvr_ds.data.feature_writer import FeatureWriter, SampleRows
from ilvr_ds.data.features import FeatureSet, open_features
from ilvr_ds.data.loader import WindowDataset, iterate_windows
from ilvr_ds.data.reader import ShardReader
from ilvr_ds.data.sample import SampleError
from ilvr_ds.data.shards import open_dataset
from ilvr_ds.data.template import SampleEncoder
from ilvr_ds.data.window import Window
from ilvr_ds.errors import UserError
from tests.data.handmade import Pairs, leaves
from tests.data.packing import image_bytes, make_dataset, png_bomb, serve
from tests.golden_set import GoldenSet

WIDTH, SAMPLES = 3, 6
INPUTS, HELPERS = 12, 6
"""Merged patches of a sample's two input images and of its helper image: an image of 8x6 pixels has six."""
MADE_OF = {"data": "?", "tower": "a" * 64, "images.max_pixels": 1000}
MEND = "ilvr-ds encode ..."


def rows_of(number: int) -> SampleRows:
    """Rows that name the sample and the merged patch."""
    rows = np.array([[number, patch, 7] for patch in range(INPUTS + HELPERS)], np.uint16)
    return rows[:INPUTS], rows[INPUTS:]


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set of two shards and its features in the folder `features` beside."""
    folder = tmp_path_factory.mktemp("features") / "set"
    make_dataset(folder, SAMPLES, per_shard=4)
    write(folder)
    return folder


def write(folder: Path) -> None:
    writer = FeatureWriter(folder / "features", made_of(folder), WIDTH, {})
    for name, numbers in (("shard-000000", range(4)), ("shard-000001", range(4, 6))):
        writer.write(name, map(rows_of, numbers))
    assert writer.finish(["shard-000000", "shard-000001"])


def made_of(folder: Path) -> dict[str, Any]:
    return {**MADE_OF, "data": open_dataset(folder).fingerprint}


def features_of(folder: Path, location: str | None = None, **changes: Any) -> FeatureSet:
    place = location or str(folder / "features")
    return open_features(place, open_dataset(folder), {**made_of(folder), **changes}, "data.features", MEND)


@pytest.fixture
def folder(written: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(written, tmp_path / "set"))


def test_rows_come_back_with_and_without_helpers(written: Path) -> None:
    features = pickle.loads(pickle.dumps(features_of(written)))
    for number in (5, 0, 3, 4):
        inputs, helpers = rows_of(number)
        assert features.read(number, INPUTS, HELPERS).tolist() == [*inputs.tolist(), *helpers.tolist()]
        assert features.read(number, INPUTS, 0).tolist() == inputs.tolist(), "stage 2"


def test_http_reads_the_range_of_the_rows_alone(written: Path) -> None:
    """Catches whole files of rows that go over the network for one sample."""
    with serve(written / "features") as (address, handler):
        features = features_of(written, address)
        handler.requests.clear()
        assert features.read(4, INPUTS, HELPERS)[:, 0].tolist() == [4] * 18
        assert handler.requests == [("/shard-000001.rows", "bytes=0-107")]


@pytest.mark.parametrize(("key", "value"), [("data", "b" * 64), ("tower", "b" * 64), ("images.max_pixels", 2000)])
def test_features_of_something_else_are_refused(key: str, value: Any, written: Path) -> None:
    """Catches training on what another tower made of other pictures. The line says what differs and what to run."""
    with pytest.raises(UserError) as caught:
        features_of(written, **{key: value})
    message = str(caught.value)
    assert message.startswith(f"data.features: {written / 'features'}: made with {key} = ")
    assert message.endswith(f"to have features for this recipe: {MEND}") and "\n" not in message
    assert str(value)[:12] in message


def without_an_entry(folder: Path) -> None:
    content = json.loads((folder / "features.json").read_text())
    (folder / "features.json").write_text(json.dumps({**content, "shards": content["shards"][:1]}))


LIES = {
    "no features": (lambda f: (f / "features.json").unlink(), "features.json: cannot be read"),
    "not JSON": (lambda f: (f / "features.json").write_text("{"), "not a valid description"),
    "another version": (lambda f: (f / "features.json").write_text('{"version": 9}'), "version 9 is unknown"),
    "a shard too few": (without_an_entry, "its shards are not those of the data set"),
    "no rows": (lambda f: (f / "shard-000001.rows").unlink(), "shard-000001.rows: cannot be read"),
    "rows cut": (lambda f: (f / "shard-000001.rows").write_bytes(b"abc"), "has 3 bytes, 216 were written"),
    "another index": (lambda f: (f / "shard-000000.rowidx").write_bytes(bytes(96)), "is not the index"),
    "no index": (lambda f: (f / "shard-000000.rowidx").unlink(), "shard-000000.rowidx: cannot be read"),
}


@pytest.mark.parametrize("lie", LIES)
def test_what_is_missing_or_changed_is_refused_at_the_start(lie: str, folder: Path) -> None:
    damage, words = LIES[lie]
    damage(folder / "features")
    with pytest.raises(UserError) as caught:
        features_of(folder)
    assert words in str(caught.value) and str(caught.value).endswith(MEND) and "\n" not in str(caught.value)


def flip(folder: Path, number: int, row: int) -> None:
    """Flip a bit of a row of a sample of the first shard."""
    rows = folder / "features/shard-000000.rows"
    data = bytearray(rows.read_bytes())
    data[2 * WIDTH * ((INPUTS + HELPERS) * number + row) + 1] ^= 4
    rows.write_bytes(data)


@pytest.mark.parametrize("row", [0, INPUTS - 1, INPUTS, INPUTS + HELPERS - 1])
def test_a_flipped_bit_is_found(row: int, folder: Path) -> None:
    """Within rows nothing but the checksum can tell. Stage 2 does not read the helpers' rows and goes on."""
    flip(folder, 2, row)
    features = features_of(folder)
    with pytest.raises(UserError, match="sample 2: the bytes are not those that were written"):
        features.read(2, INPUTS, HELPERS)
    if row >= INPUTS:
        features.read(2, INPUTS, 0)
    features.read(1, INPUTS, HELPERS)
    features.read(3, INPUTS, HELPERS)


@pytest.mark.parametrize(
    ("inputs", "helpers"), [(INPUTS + 1, HELPERS), (INPUTS, HELPERS - 1), (INPUTS + 1, 5), (6, 12)]
)
def test_rows_that_do_not_fit_the_images_are_refused(inputs: int, helpers: int, written: Path) -> None:
    with pytest.raises(SampleError, match=rf"12 \+ 6 rows are stored, its images make {inputs} \+ {helpers}"):
        features_of(written).read(2, inputs, helpers)


def dataset_of(folder: Path, golden: GoldenSet, with_features: bool) -> WindowDataset:
    whole = golden.encoder
    encoder = SampleEncoder(
        whole.tokenizer, whole.special, whole.images, whole.latent_size, whole.max_tokens, with_pixels=not with_features
    )
    numbers = Pairs()
    features = features_of(folder) if with_features else None
    return WindowDataset(ShardReader(open_dataset(folder)), encoder, golden.collator("right"), numbers, features)


def named(window: Window, names: torch.Tensor) -> Iterator[list[list[int]]]:
    """Which rows stand at the image tokens and in the candidates of a window whose rows have these names."""
    yield names[window.tokens.image_rows].tolist()
    yield names[window.candidates.rows[:, 0]].tolist()
    for micro in window.micro_batches:
        yield names[micro.tokens.image_rows].tolist()


def test_windows_are_those_with_pixels(written: Path, golden: GoldenSet, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches rows of the wrong image or patch, and any token, label or position that differs."""
    with_pixels = dataset_of(written, golden, False)[0]
    monkeypatch.setattr(images_module, "decode_image", lambda data: pytest.fail("pixels are decoded"))
    stored = dataset_of(written, golden, True)[0]
    assert stored.bad == () and stored.images == () and stored.features is not None
    assert stored.features.dtype == torch.bfloat16 and stored.features.shape == (4 * (INPUTS + HELPERS), WIDTH)
    ours, theirs = (dict_of(window) for window in (stored, with_pixels))
    for name, tensors in theirs.items():
        assert all(torch.equal(a, b) for a, b in zip(ours[name], tensors, strict=True)), name
    names = stored.features.view(torch.int16)[:, :2].int()
    # the tower's order: of each micro-batch all input images, then all helper images
    tower_order = torch.tensor(
        [
            [number, row]
            for pair in ((0, 1), (2, 3))
            for rows in (range(INPUTS), range(INPUTS, INPUTS + HELPERS))
            for number in pair
            for row in rows
        ]
    )
    assert list(named(stored, names)) == list(named(with_pixels, tower_order))


def dict_of(window: Window) -> dict[str, list[torch.Tensor]]:
    """All tensors of a window by name, but the images, the features and the numbers of their rows."""
    found: dict[str, list[torch.Tensor]] = {}
    for part in (window.tokens, window.context, *window.micro_batches):
        for name, tensor in leaves(part):
            if name not in ("image_rows", "rows"):
                found.setdefault(name, []).append(tensor)
    return found


@pytest.mark.parametrize("workers", [0, 2])
def test_a_damaged_row_makes_a_stand_in(workers: int, folder: Path, golden: GoldenSet) -> None:
    """Through worker processes too. Catches an error that ends the run, and rows that move to another sample."""
    flip(folder, 2, 3)
    [window] = iterate_windows(dataset_of(folder, golden, True), [0], workers, pin_memory=False)
    [bad] = window.bad
    assert (bad.number, bad.id, bad.shard) == (2, "sample-2", "shard-000000.tar")
    assert "shard-000000.rows: sample 2: the bytes are not those" in bad.reason
    assert window.features is not None and len(window.features) == 3 * (INPUTS + HELPERS)
    seen = window.features.view(torch.int16)[window.tokens.image_rows][:, 0]
    assert seen.tolist() == [0] * INPUTS + [1] * INPUTS + [3] * INPUTS


def test_a_window_without_any_feature_has_the_right_width(folder: Path, golden: GoldenSet) -> None:
    """A rank whose samples are all bad: catches a shape that the student's embeddings do not take."""
    for number in range(4):
        flip(folder, number, 0)
    window = dataset_of(folder, golden, True)[0]
    assert len(window.bad) == 4 and window.features is not None and window.features.shape == (0, WIDTH)
    assert window.features.dtype == torch.bfloat16


def test_reads_that_were_tried_again_are_counted(
    written: Path, golden: GoldenSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ilvr_ds.data.storage.PAUSES_S", (0.01,) * 3)
    with serve(written / "features") as (address, handler):
        dataset = dataset_of(written, golden, True)
        dataset.features = features_of(written, address)
        handler.faults[:] = ["503", "", "cut"]
        window = dataset[0]
        assert (window.bad, window.retries) == ((), 2)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
@pytest.mark.parametrize("size", [(8, 6), (300, 17), (1, 40)])
def test_sizes_are_those_of_the_decoded_image(kind: str, size: tuple[int, int]) -> None:
    """Catches grids, and with them positions and rows, that differ from those with pixels."""
    data = image_bytes(3, kind, size)
    assert image_size(data) == decode_image(data).size == size


@pytest.mark.parametrize("data", [b"no image", png_bomb(), image_bytes()[:20]])
def test_headers_are_checked_like_images(data: bytes) -> None:
    with pytest.raises(SampleError) as by_header:
        image_size(data)
    with pytest.raises(SampleError) as by_pixels:
        decode_image(data)
    assert str(by_header.value) == str(by_pixels.value)
