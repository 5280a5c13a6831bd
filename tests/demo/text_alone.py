"""A learner that sees a sample's words alone: what it finds out, the words give away."""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Iterable
from itertools import combinations

import numpy as np

from ilvr_ds.data.sample import Sample, TextStep
from tests.demo.demo_reader import read_picture


def words_before_answer(sample: Sample) -> str:
    steps = [step.content for step in sample.steps[:-1] if isinstance(step, TextStep)]
    return " ".join([sample.question, *steps])


def text_features(sample: Sample) -> list[str]:
    """Words, words at their places, and pairs of options."""
    words = words_before_answer(sample).split()
    options = [f"{letter}{option}" for letter, option in re.findall(r"([A-D])\) (\S+)", sample.question)]
    pairs = ["+".join(pair) for pair in combinations(options, 2)]
    return [*words, *(f"{place}:{word}" for place, word in enumerate(words)), *options, *pairs]


def text_and_picture_features(sample: Sample) -> list[str]:
    """The same, and each option beside what the last helper picture holds."""
    last = read_picture(sample.helper_images[-1])
    facts = [str(len(last.cells)), *last.cells.values()]
    options = re.findall(r"[A-D]\) \S+", sample.question)
    return text_features(sample) + [f"{option}|{fact}" for option in options for fact in facts]


def naive_bayes_score(train: list[Sample], test: list[Sample], features) -> float:
    """The share of right letters, with one learner for each operation."""
    counts: dict[str, np.ndarray] = defaultdict(lambda: np.ones(4))
    priors: dict[str, np.ndarray] = defaultdict(lambda: np.ones(4))
    for sample in train:
        letter = "ABCD".index(sample.answer)
        priors[sample.group][letter] += 1
        for feature in features(sample):
            counts[sample.group + feature][letter] += 1
    right = 0
    for sample in test:
        prior = priors[sample.group]
        known = [counts[key] for f in features(sample) if (key := sample.group + f) in counts]
        score = np.log(prior) + np.log(np.array(known) / prior).sum(axis=0)
        right += "ABCD"[int(score.argmax())] == sample.answer
    return right / len(test)


def assert_the_total_tells_nothing(samples: Iterable[Sample]) -> None:
    """How many shapes an input picture has, of which of the options, numbers all, is right."""
    ranks, totals = [], []
    for sample in samples:
        numbers = [int(number) for number in re.findall(r"\) (\d+)", sample.question)]
        ranks.append(sorted(numbers).index(numbers["ABCD".index(sample.answer)]))
        totals.append(len(read_picture(sample.input_images[0]).cells))
    assert abs(np.corrcoef(ranks, totals)[0, 1]) < 3.3 / math.sqrt(len(ranks))
