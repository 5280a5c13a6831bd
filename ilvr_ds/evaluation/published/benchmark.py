"""A published benchmark: where its data lie, what is asked, how a reply is judged, and which figures are reported."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from ilvr_ds.data.sample import Sample, SampleError
from ilvr_ds.evaluation.benchmarks import Benchmark
from ilvr_ds.evaluation.published.rows import Row
from ilvr_ds.evaluation.results import Line
from ilvr_ds.evaluation.scoring import LETTERS, extract_answer

FINAL = "-final"
"""Ends the name of the same rule on what a reply gives as its answer."""


@dataclass(frozen=True, kw_only=True)
class Published(Benchmark):
    """Judged by letters: by the published rule on the whole reply, and by the same on what the reply concludes.

    Rules that were written for bare letters take the first capital of a rationale for an answer, so that a model which
    reasons first needs the second.
    """

    form: str = ""
    """The published prompt says it."""
    hub: str
    """Name of the usual data set."""
    layouts: tuple[str, ...]
    """Patterns of its files, the first that exists counts."""
    pictures: frozenset[str]
    """Columns of parquet files that hold pictures."""
    sample: Callable[[Row], Sample]
    """What a record asks; raises SampleError."""
    letter: Callable[[str, Sequence[str]], str]
    """What a reply is taken for, given the options' texts; "" or another letter where it is none of them."""
    figures: Callable[[Sequence[Line], str], dict[str, float]]
    """What is reported, of finished lines under a rule, by name."""
    reference: str
    """Where prompt and rule were published."""

    def check(self, sample: Sample) -> None:
        """Raise SampleError where the answer is not one of the options."""
        if not sample.answer or sample.answer not in LETTERS[: len(self.options(sample))]:
            raise SampleError(f"its answer '{sample.answer}' is none of {len(self.options(sample))} options")

    def options(self, sample: Sample) -> list[str]:
        """Their texts."""
        return list(json.loads(sample.meta["options"]))

    def answer(self, sample: Sample, response: str) -> str:
        """The letter that the published rule takes the reply for."""
        return self.letter(response, self.options(sample))

    def versions(self) -> dict[str, str]:
        """Their names say which version of a harness they are of; this counts changes of ours."""
        return dict.fromkeys(self.rules, "1")

    def reported(self, lines: Sequence[Line]) -> dict[str, dict[str, float]]:
        """The published figures under both rules."""
        return {rule: self.figures(lines, rule) for rule in self.rules}

    def judge(self, sample: Sample, response: str) -> dict[str, Any]:
        """Verdict of the rule on the whole reply, and on its conclusion."""
        options = self.options(sample)
        whole, final = self.rules
        return {
            whole: self.letter(response, options) == sample.answer,
            final: self.letter(extract_answer(response), options) == sample.answer,
        }


def asked(
    name: str, question: str, pictures: Sequence[bytes | None], options: Sequence[str], answer: str, group: str
) -> Sample:
    """A question as a sample, its pictures before the words; raises SampleError without any."""
    found = tuple(data for data in pictures if data is not None)
    if not found:
        raise SampleError("it has no picture")
    return Sample(
        id=name,
        question=question,
        steps=(),
        input_images=found,
        answer=answer,
        group=group,
        meta={"options": json.dumps(list(options))},
    )


def share(lines: Sequence[Line], rule: str) -> float:
    """Accuracy under a rule."""
    right: int = sum(line["verdicts"][rule] for line in lines)
    return right / len(lines)


def shares_by_type(lines: Sequence[Line], rule: str) -> dict[str, float]:
    """Accuracy of each type, by name."""
    types = sorted({line["type"] for line in lines})
    return {name: share([line for line in lines if line["type"] == name], rule) for name in types}
