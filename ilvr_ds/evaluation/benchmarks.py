"""What `--benchmark` names: how a sample's answer is known, and how a response to it is judged."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ilvr_ds.data.sample import Sample, SampleError
from ilvr_ds.errors import UserError, nearest
from ilvr_ds.evaluation.planning import read_actions, read_map, run_actions
from ilvr_ds.evaluation.results import Line
from ilvr_ds.evaluation.scoring import RULES, clean, comt_answer, extract_answer, read_options


@dataclass(frozen=True)
class Benchmark:
    """`rules`: names of the rule sets that judge each response; the first is the main one."""

    name: str
    rules: tuple[str, ...]

    def check(self, sample: Sample) -> None:
        """Raise SampleError where the sample lacks what its responses are judged by."""
        if self.name == "vsp":
            read_map(sample.meta)
        elif not sample.answer.strip():
            raise SampleError("it has no answer")

    def options(self, sample: Sample) -> list[str]:
        """The options among which a guess would choose; [] where they are not known."""
        return [] if self.name == "vsp" else read_options(sample.question)

    def answer(self, sample: Sample, response: str) -> str:
        """What the main rule set takes for the answer; "" where it finds none."""
        if self.name == "vsp":
            return " ".join(read_actions(response))
        found = comt_answer(response, self.options(sample)) if self.name == "comt" else clean(extract_answer(response))
        return found or ""

    def reported(self, lines: Sequence[Line]) -> dict[str, dict[str, float]]:
        """The figures that the benchmark's publishers report, by rule and name; {} where it is not a published one."""
        return {}

    def judge(self, sample: Sample, response: str) -> dict[str, Any]:
        """Verdict of each rule set by name, and for planning how the plan ended as `outcome`."""
        if self.name == "vsp":
            outcome = run_actions(read_map(sample.meta), read_actions(response))
            return {"vsp": outcome == "success", "outcome": outcome}
        options = self.options(sample)
        return {name: RULES[name](response, sample.answer, options) for name in self.rules}


BENCHMARKS = {
    "comt": Benchmark("comt", ("comt-official", "ilvr-2026-08")),
    "vsp": Benchmark("vsp", ("vsp",)),
    "exact-match": Benchmark("exact-match", ("exact-match",)),
}


def find_benchmark(name: str) -> Benchmark:
    """The benchmark of this name, our own or a published one; raises UserError."""
    from ilvr_ds.evaluation.published.table import PUBLISHED  # they are made of Benchmark

    known = {**BENCHMARKS, **PUBLISHED}
    if name not in known:
        raise UserError(f"--benchmark: '{name}' is unknown{nearest(name, known)}")
    return known[name]
