"""What `--benchmark` names: how a sample's answer is known, and how a response to it is judged.

A further benchmark is an entry in BENCHMARKS; its rule sets are in RULES. One that is judged by more than a sample's
answer and options is a class of its own.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ilvr_ds.data.sample import Sample, SampleError
from ilvr_ds.errors import UserError, nearest
from ilvr_ds.evaluation.comt_judge import LETTERS
from ilvr_ds.evaluation.planning import read_actions, read_map, run_actions
from ilvr_ds.evaluation.results import Line
from ilvr_ds.evaluation.scoring import RULES, answer_letter, read_options

OPTION_KEYS = ("option", "options")
"""Keys under which records list the texts of their options; `pack` keeps them in a sample's meta, as JSON."""
_COMPARE_TEXTS = "take --benchmark ilvr, which compares texts"


@dataclass(frozen=True)
class Benchmark:
    """`rules`: names of the rule sets that judge each response; the first is the main one."""

    name: str
    rules: tuple[str, ...]
    form: str = "The final answer is: ANSWER"
    """How models are asked to write their answer that were not trained to (modes.py)."""

    def check(self, sample: Sample) -> None:
        """Raise SampleError where the sample lacks what its responses are judged by."""
        if not sample.answer.strip():
            raise SampleError("it has no answer")

    def options(self, sample: Sample) -> list[str]:
        """The options among which a guess would choose, as the record lists them, else as its question does; [] where
        they are not known."""
        listed = (_listed(sample.meta[key]) for key in OPTION_KEYS if key in sample.meta)
        return next(filter(None, listed), None) or read_options(sample.question)

    def answer(self, sample: Sample, response: str) -> str:
        """What the main rule set takes for the answer; "" where it finds none."""
        return RULES[self.rules[0]].read(response, self.options(sample)) or ""

    def reported(self, lines: Sequence[Line]) -> dict[str, dict[str, float]]:
        """The figures that the benchmark's publishers report, by rule and name; {} where it is not a published one."""
        return {}

    def judge(self, sample: Sample, response: str) -> dict[str, Any]:
        """Verdict of each rule set by name."""
        options = self.options(sample)
        return {name: RULES[name](response, sample.answer, options) for name in self.rules}

    def is_right(self, sample: Sample, response: str) -> bool:
        """The verdict of the main rule set."""
        return bool(self.judge(sample, response)[self.rules[0]])

    def versions(self) -> dict[str, str]:
        """Of each rule set by name."""
        return {name: RULES[name].version for name in self.rules}


class ComtBenchmark(Benchmark):
    """CoMT's own judge knows four options, by their letters."""

    def check(self, sample: Sample) -> None:
        """Raise SampleError where the sample lacks what its responses are judged by."""
        super().check(sample)
        options = self.options(sample)
        if len(options) > len(LETTERS):
            raise SampleError(f"it has {len(options)} options, CoMT's judge knows A to D; take option-letter")
        if answer_letter(sample.answer, options) not in tuple(LETTERS):
            what = "no option's letter or text" if options else "no letter, and its options are not known"
            raise SampleError(f"its answer '{sample.answer}' is {what}; {_COMPARE_TEXTS}")


class LetterBenchmark(Benchmark):
    """Questions with options, as far as these are known."""

    def check(self, sample: Sample) -> None:
        """Raise SampleError where no response could be right."""
        super().check(sample)
        options = self.options(sample)
        if options and answer_letter(sample.answer, options) is None:
            raise SampleError(f"its answer '{sample.answer}' is no option's letter or text; {_COMPARE_TEXTS}")


class PlanningBenchmark(Benchmark):
    """VSP: the plan of a response is run on the sample's map."""

    def check(self, sample: Sample) -> None:
        """Raise SampleError where the sample has no map."""
        read_map(sample.meta)

    def options(self, sample: Sample) -> list[str]:
        """None to choose among."""
        return []

    def answer(self, sample: Sample, response: str) -> str:
        """The moves."""
        return " ".join(read_actions(response))

    def judge(self, sample: Sample, response: str) -> dict[str, Any]:
        """Verdict, and how the plan ended as `outcome`."""
        outcome = run_actions(read_map(sample.meta), read_actions(response))
        return {self.rules[0]: outcome == "success", "outcome": outcome}

    def versions(self) -> dict[str, str]:
        """Of the one rule set."""
        return {self.rules[0]: "1"}


_LETTER = "The final answer is: (LETTER), the letter being that of the right option"
_ILVR_RULES = ("ilvr-2026-08", "ilvr-script-13a67ed", "ilvr-script-5eff4f9")
_ALL = (
    ComtBenchmark("comt", ("comt-official", *_ILVR_RULES), _LETTER),
    Benchmark("ilvr", _ILVR_RULES),
    LetterBenchmark("option-letter", ("option-letter",), _LETTER),
    PlanningBenchmark("vsp", ("vsp",), r"\boxed{MOVES}, the moves being letters among L, R, U and D"),
    Benchmark("exact-match", ("exact-match",)),
)
BENCHMARKS: Mapping[str, Benchmark] = {benchmark.name: benchmark for benchmark in _ALL}


def find_benchmark(name: str) -> Benchmark:
    """The benchmark of this name, our own or a published one; raises UserError."""
    from ilvr_ds.evaluation.published.table import PUBLISHED  # they are made of Benchmark

    known = {**BENCHMARKS, **PUBLISHED}
    if name not in known:
        raise UserError(f"--benchmark: '{name}' is unknown{nearest(name, known)}")
    return known[name]


def _listed(text: str) -> list[str]:
    """The texts of a list; [] where the key holds something else."""
    try:
        values = json.loads(text)
    except ValueError:
        return []
    is_list = isinstance(values, list) and all(isinstance(value, (str, int, float)) for value in values)
    return [str(value) for value in values] if is_list else []
