"""Questions about cells, and captions."""

from __future__ import annotations

import math
import re
from collections import Counter, defaultdict
from dataclasses import replace

import numpy as np
import pytest

from ilvr_ds.data.check import check_sample
from ilvr_ds.data.sample import Sample
from ilvr_ds.demo.task import TaskSpec, draw_samples
from tests.demo.demo_reader import read_picture
from tests.demo.text_alone import assert_the_total_tells_nothing, naive_bayes_score, text_features

LOOKS = [TaskSpec(operations=("look",)), TaskSpec(grid=6, shapes=8, colours=8, operations=("look",), shaded=True)]


def kind_of(sample: Sample) -> str:
    """The words of its question that the kinds do not share."""
    kinds = r"What stands in row|What stands in the marked|What colour|Count|Where|Describe"
    return re.match(kinds, sample.question)[0]


@pytest.mark.parametrize("split", ["train", "held_out"])
def test_looks_are_balanced_in_every_kind_and_have_no_helper_pictures(split: str) -> None:
    letters, counts = defaultdict(Counter), Counter()
    for sample in draw_samples(LOOKS[0], 4, split, 4000):
        check_sample(sample)
        counts[kind_of(sample)] += 1
        letters[kind_of(sample)][sample.answer] += 1
        assert not sample.helper_images and len(sample.steps) == 1 and sample.group == "look"
    assert 1900 < counts.pop("Describe") < 2100, "half are captions"
    assert len(counts) == 5 and min(counts.values()) > 340 and max(counts.values()) < 460
    assert set(letters.pop("Describe")) == {""}, "a caption has no answer"
    for kind, found in letters.items():
        expected = sum(found.values()) / 4
        assert sum((found[letter] - expected) ** 2 / expected for letter in "ABCD") < 16.3, kind


@pytest.mark.parametrize("shuffled", [True, False])
def test_the_text_of_a_look_is_no_better_than_chance(shuffled: bool) -> None:
    """One learner for each kind."""
    spec = TaskSpec(operations=("look",), shuffled_options=shuffled)
    train, test = (
        [replace(sample, group=kind_of(sample)) for sample in draw_samples(spec, 9, *which) if sample.answer]
        for which in (("train", 4000), ("held_out", 2000))
    )
    assert naive_bayes_score(train, test, text_features) < 0.25 + 3.3 * math.sqrt(0.25 * 0.75 / len(test))


def test_a_caption_lists_what_is_in_the_picture() -> None:
    captions = [sample for spec in LOOKS for sample in draw_samples(spec, 6, "train", 120) if not sample.answer]
    marks, contents = 0, Counter()
    for sample in captions:
        given, (text,) = read_picture(sample.input_images[0]), [step.content for step in sample.steps]
        asked = re.fullmatch(r"Describe (?:the image|row (\d) of the image) cell by cell\.", sample.question)[1]
        assert (asked is None) == (given.side == 4)
        read = {
            (int(row) - 1, int(column) - 1): name
            for row, column, name in re.findall(r"row (\d), column (\d): ([a-z ]+)", text)
        }
        contents.update(read.values())
        places = [place for place in np.ndindex(given.side, given.side) if asked in (None, str(place[0] + 1))]
        assert read == {place: given.cells.get(place, "nothing") for place in places} and list(read) == places
        found = re.search(r"The marked cell is row (\d), column (\d)\.$", text)
        assert given.marked == (found and (int(found[1]) - 1, int(found[2]) - 1))
        marks += found is not None
    assert 0.3 < marks / len(captions) < 0.7 and 0.4 < contents["nothing"] / contents.total() < 0.6


def test_how_many_shapes_there_are_does_not_tell_how_many_of_a_kind() -> None:
    samples = draw_samples(LOOKS[0], 3, "train", 3000)
    assert_the_total_tells_nothing(sample for sample in samples if kind_of(sample) == "Count")


def test_a_picture_does_not_tell_which_option_is_asked_for() -> None:
    """Each figure that is an option is in the picture once; each cell that is one holds something."""
    for sample in draw_samples(LOOKS[0], 3, "train", 400):
        shown = Counter(read_picture(sample.input_images[0]).cells.values())
        if kind_of(sample).startswith("What stands"):
            options = re.findall(r"[A-D]\) (\w+ \w+)", sample.question)
            assert [shown[option] for option in options] == [1] * 4
        if kind_of(sample) == "Where":
            cells = read_picture(sample.input_images[0]).cells
            places = re.findall(r"[A-D]\) row (\d), column (\d)", sample.question)
            assert len(places) == 4 and all((int(row) - 1, int(column) - 1) in cells for row, column in places)
