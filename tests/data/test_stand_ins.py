"""Bad samples at training time: each lie becomes a stand-in without a loss, and is named."""

from __future__ import annotations

import pickle
import resource
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from ilvr_ds.data import storage
from ilvr_ds.data.loader import WindowDataset
from ilvr_ds.data.reader import ShardReader
from ilvr_ds.data.shards import open_dataset
from ilvr_ds.data.window import Window
from tests.data.handmade import Pairs, leaves
from tests.data.hostile import HOSTILE, members_of, plant, sample_bytes
from tests.data.packing import make_dataset, serve
from tests.golden_set import GoldenSet

BAD = 2
"""The sample that lies; it stands in the middle of a shard of four."""


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("stand-ins") / "set"
    make_dataset(folder, 4)
    return folder


@pytest.fixture
def folder(packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy, in a working directory of its own where whatever is executed or extracted would leave a trace."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return Path(shutil.copytree(packed, tmp_path / "set"))


def dataset_of(location: Path | str, golden: GoldenSet) -> WindowDataset:
    reader = ShardReader(open_dataset(location))
    return WindowDataset(reader, golden.encoder, golden.collator("right"), Pairs())


def check_stand_in(window: Window, packed: Path, golden: GoldenSet) -> None:
    """The window of all four samples is that of the other three, and of a sample that adds nothing."""
    [bad] = window.bad
    offset = int(open_dataset(packed).index[BAD]["offset"])
    assert (bad.number, bad.shard, bad.offset) == (BAD, "shard-000000.tar", offset)
    assert bad.reason and "\n" not in bad.reason
    whole = dataset_of(packed, golden)[0]
    first, second = window.micro_batches
    for (name, tensor), (_, expected) in zip(leaves(first), leaves(whole.micro_batches[0]), strict=True):
        assert torch.equal(tensor, expected), name
    assert second.ids[1] == "sample-3" and second.ids[0] in ("sample-2", "sample 2")
    alone = dataset_of(packed, golden).window([np.array([3, 3])]).micro_batches[0]
    assert second.label_ids.tolist() == alone.label_ids[: len(alone.label_ids) // 2].tolist()
    assert second.sample_of_segment.tolist() == [1] and second.has_answer.tolist() == [False, True]
    assert int(window.supervised) == len(first.label_ids) + len(second.label_ids)


@pytest.mark.parametrize("lie", HOSTILE)
def test_a_lie_that_was_indexed_is_a_stand_in(lie: str, folder: Path, packed: Path, golden: GoldenSet) -> None:
    """All sums agree with the lie: catches everything that only the checksums keep out."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    plant(folder, BAD, HOSTILE[lie](members_of(sample_bytes(folder, BAD))))
    check_stand_in(dataset_of(folder, golden)[0], packed, golden)
    assert not list(Path.cwd().iterdir()), "nothing is executed or extracted"
    # a bomb would take 1.4 GB; what a first import or a first tokenizer call takes stays far below
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 500 * 1024


@pytest.mark.parametrize("lie", HOSTILE)
def test_a_sample_that_changed_after_indexing_is_a_stand_in(
    lie: str, folder: Path, packed: Path, golden: GoldenSet
) -> None:
    """The tar changes under a running job; catches contents that are accepted though the index knows better."""
    dataset = dataset_of(folder, golden)
    true = sample_bytes(folder, BAD)
    lying = HOSTILE[lie](members_of(true))[: len(true)].ljust(len(true), b"\0")
    tar = folder / "shard-000000.tar"
    tar.write_bytes(tar.read_bytes().replace(true, lying))
    check_stand_in(dataset[0], packed, golden)
    assert not list(Path.cwd().iterdir())


@pytest.mark.parametrize("position", [0.05, 0.35, 0.6, 0.95])
def test_a_flipped_bit_anywhere_is_noticed(position: float, folder: Path, packed: Path, golden: GoldenSet) -> None:
    """Within a picture or a text nothing but the checksum can tell."""
    dataset = dataset_of(folder, golden)
    entry = dataset.reader.shard_set.index[BAD]
    tar = folder / "shard-000000.tar"
    data = bytearray(tar.read_bytes())
    data[int(entry["offset"]) + int(position * int(entry["length"]))] ^= 1
    tar.write_bytes(data)
    check_stand_in(dataset[0], packed, golden)


def test_a_shard_that_is_cut_or_gone_while_training(folder: Path, golden: GoldenSet) -> None:
    dataset = dataset_of(folder, golden)
    tar, offset = folder / "shard-000000.tar", int(dataset.reader.shard_set.index[BAD]["offset"])
    tar.write_bytes(tar.read_bytes()[:offset])
    window = dataset[0]
    assert [bad.number for bad in window.bad] == [2, 3]
    assert "bytes too early" in window.bad[0].reason
    tar.unlink()
    window = dataset_of_again(dataset)[0]
    assert [bad.number for bad in window.bad] == [0, 1, 2, 3]
    assert "No such file" in window.bad[0].reason


def dataset_of_again(dataset: WindowDataset) -> WindowDataset:
    """As a fresh worker sees it, without files that are open already."""
    return pickle.loads(pickle.dumps(dataset))


def test_a_window_of_stand_ins_alone_has_the_form_of_any_other(folder: Path, golden: GoldenSet) -> None:
    """Catches a micro-batch for which the tower, the teacher or the student would not be called."""
    dataset = dataset_of(folder, golden)
    (folder / "shard-000000.tar").unlink()
    window = dataset[0]
    assert len(window.bad) == 4
    assert len(window.images) == len(window.micro_batches) == 2
    assert all(len(images.patches) for images in window.images)
    assert window.tokens.input_ids.shape[0] == 4 and bool(window.context.prompt_mask.any(1).all())
    assert int(window.supervised) == 0 and window.context.rounds == ()


def test_a_fault_that_passes_is_tried_again_and_counted(
    folder: Path, golden: GoldenSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storage, "PAUSES_S", (0.01,) * 3)
    with serve(folder) as (address, handler):
        dataset = dataset_of(address, golden)
        handler.faults[:] = ["503", "", "cut", "500"]
        window = dataset[0]
        assert (window.bad, window.retries) == ((), 3)
        assert dataset[0].retries == 0, "each window has its own"
        handler.faults[:] = ["503"] * 4
        window = dataset[0]
        assert [bad.number for bad in window.bad] == [0] and window.retries == 3
        assert "the server answers 503" in window.bad[0].reason
