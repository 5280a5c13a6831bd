"""Several data sets read as one."""

from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest

from ilvr_ds.config import DataSetConfig
from ilvr_ds.data.collate import Collator
from ilvr_ds.data.loader import SequentialNumbers, SetAfterSet
from ilvr_ds.data.mixture import Mixture, MixtureReader
from ilvr_ds.errors import UserError
from tests.data.handmade import LAYOUT, SPECIAL, K
from tests.data.packing import make_dataset
from tests.data.test_collate import SAMPLES


def two(folder: Path) -> Mixture:
    make_dataset(folder / "a", samples=10)
    make_dataset(folder / "b", samples=5)
    return Mixture.open([DataSetConfig(str(folder / "a"), "a"), DataSetConfig(str(folder / "b"), "b")])


def test_samples_are_numbered_through_and_ids_begin_with_the_set(tmp_path: Path) -> None:
    """Both sets have a sample-0: messages, quarantine and pictures must tell them apart."""
    mixture = two(tmp_path)
    reader = pickle.loads(pickle.dumps(MixtureReader(mixture)))
    assert len(reader) == len(mixture) == 15 and mixture.starts.tolist() == [0, 10]
    assert [reader.read(number).id for number in (0, 9, 10, 14)] == [
        "a/sample-0", "a/sample-9", "b/sample-0", "b/sample-4",
    ]  # fmt: skip
    assert reader.place(10) == reader.place(0) == ("shard-000000.tar", 0)
    assert mixture.tokens.tolist() == [*range(100, 110), *range(100, 105)]
    assert mixture.groups == {"creation": 8, "deletion": 7} and mixture.longest_tokens == 109
    with pytest.raises(IndexError):
        reader.read(15)


def test_one_data_set_is_what_it_was(tmp_path: Path) -> None:
    make_dataset(tmp_path / "a")
    mixture = Mixture.open([DataSetConfig(str(tmp_path / "a"))])
    assert MixtureReader(mixture).read(3).id == "sample-3" and mixture.named == ()
    assert mixture.fingerprint == mixture.sets[0].fingerprint


def test_the_same_data_under_two_paths_is_refused(tmp_path: Path) -> None:
    make_dataset(tmp_path / "a")
    shutil.copytree(tmp_path / "a", tmp_path / "copy")
    entries = [DataSetConfig(str(tmp_path / name), name) for name in ("a", "copy")]
    with pytest.raises(UserError, match=r"data.shards: \S+/a and \S+/copy hold the same data; keep one of them"):
        Mixture.open(entries)


def test_lengths_must_have_been_measured_alike(tmp_path: Path) -> None:
    """Catches micro-batches that are filled by the tokens of two tokenizers."""
    two(tmp_path)
    for name, model in (("a", "m"), ("b", "other")):
        file = tmp_path / name / "dataset.json"
        content = json.loads(file.read_text()) | {"tokens_measured_with": {"model.path": model, "model.latent_size": 4}}
        file.write_text(json.dumps(content))
    mixture = Mixture.open([DataSetConfig(str(tmp_path / name), name) for name in ("a", "b")])
    with pytest.raises(UserError, match=r"a was packed with model.path = m, b with other; pack both with this recipe"):
        mixture.check_measured_alike()


def test_a_micro_batch_knows_the_set_of_each_label_and_segment() -> None:
    samples, numbers = SAMPLES[:4], np.array([12, 3, 10, 9])
    collator = Collator(SPECIAL, LAYOUT, K, 4, "packed", set_starts=np.array([0, 10]))
    micro = collator(samples, numbers, [4]).micro_batches[0]
    wanted = [1, 0, 1, 0]
    lengths = [int((sample.labels != -100).sum()) for sample in samples]
    assert micro.label_sets is not None and micro.segment_sets is not None and micro.supervised_by_set is not None
    assert micro.label_sets.tolist() == np.repeat(wanted, lengths).tolist()
    assert micro.segment_sets.tolist() == [wanted[b] for b in micro.sample_of_segment.tolist()]
    assert micro.supervised_by_set.tolist() == [lengths[1] + lengths[3], lengths[0] + lengths[2]]


def test_an_evaluation_goes_through_the_sets_one_after_the_other() -> None:
    numbers = SetAfterSet(SequentialNumbers(2, rank=1, world=2), [0, 100], sizes=[100, 7], steps=[2, 1], most=100)
    assert [[part.tolist() for part in numbers(step)] for step in range(3)] == [[[2, 3]], [[6, 7]], [[102, 103]]]
    with pytest.raises(IndexError):
        numbers(3)


def evaluated(size: int, most: int, world: int = 1) -> list[int]:
    """Numbers of what an evaluation takes of a set that begins at 1,000, in the order of steps and ranks."""
    steps = min(size, most) // (2 * world)
    ranks = [SetAfterSet(SequentialNumbers(2, rank, world), [1000], [size], [steps], most) for rank in range(world)]
    return [int(number) - 1000 for step in range(steps) for rank in ranks for number in rank(step)[0]]


def test_an_evaluation_of_a_part_takes_it_evenly_from_the_whole_set() -> None:
    """Catches the first samples alone: of data that are sorted by kind these are of the first kinds."""
    assert evaluated(size=100, most=8) == [0, 12, 25, 37, 50, 62, 75, 87]
    assert evaluated(100, 9) == [0, 11, 22, 33, 44, 55, 66, 77], "whole micro-batches; the last is cut off"
    assert evaluated(10, 8) == [0, 1, 2, 3, 5, 6, 7, 8]
    assert all(len(set(found := evaluated(size, 512))) == len(found) <= size for size in range(512, 1600, 17))


@pytest.mark.parametrize("most", [8, 100, 1000])
def test_an_evaluation_takes_the_same_for_any_number_of_ranks(most: int) -> None:
    for world in (2, 4):
        assert evaluated(100, most, world) == evaluated(100, most)[: len(evaluated(100, most, world))]
    if most >= 100:
        assert evaluated(100, most) == list(range(100)), "all of the set, in stored order"
