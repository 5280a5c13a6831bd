"""Free generation on a few held-out samples during training: the accuracy that people mean.

The student answers as `evaluate` lets a model answer, on its live weights. Under ZeRO-3 every layer call is collective,
so all ranks take equally many samples and go on until the last of them has ended.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np

from ilvr_ds import dist
from ilvr_ds.config import Recipe
from ilvr_ds.data.mixture import Mixture, MixtureReader
from ilvr_ds.data.reader import DamagedSampleError
from ilvr_ds.data.sample import Sample, SampleError
from ilvr_ds.data.template import EncodedSample
from ilvr_ds.engine.networks import Networks
from ilvr_ds.errors import UserError, counted
from ilvr_ds.evaluation.benchmarks import Benchmark, find_benchmark
from ilvr_ds.generation.answers import Answer
from ilvr_ds.generation.generate import Generator
from ilvr_ds.generation.loading import Reasoner
from ilvr_ds.generation.prefill import TOKENS_AT_ONCE
from ilvr_ds.generation.settings import GenerationSettings
from ilvr_ds.model.encoding import Encoding

ROOM = 2
"""The limit of an answer is so many times the longest reference among the samples: untrained models do not end."""
BENCHMARKS = ("vsp", "comt", "exact-match")
"""A sample is judged by the first of them that can."""


@dataclass(frozen=True)
class Question:
    """A held-out sample to be answered."""

    sample: Sample
    prompt: EncodedSample
    benchmark: Benchmark
    length: int
    """Tokens of its reference answer"""


class FreeAnswers:
    """Answers `questions`, this rank's, and judges the answers."""

    def __init__(self, reasoner: Reasoner, questions: list[Question], settings: GenerationSettings) -> None:
        self.reasoner = reasoner
        self.questions = questions
        self.settings = settings

    def answers(self, moved: Callable[[], object] = lambda: None) -> list[Answer]:
        """The student's answers, in order (collective). moved: called as tokens come."""

        def is_over(has_ended: bool) -> bool:
            moved()
            return all(dist.gather_on_host(has_ended))

        generator = Generator(self.reasoner, self.settings, is_over=is_over)
        prompts = [question.prompt for question in self.questions]
        longest = max(dist.gather_on_host(max(len(prompt.input_ids) for prompt in prompts)))
        rows = max(1, TOKENS_AT_ONCE // longest)  # the same on all ranks, which answer together
        answers: list[Answer] = []
        with _plain_attention(self.reasoner.model.model.language_model):
            for first in range(0, len(prompts), rows):
                answers += generator.generate(prompts[first : first + rows]).answers
        return answers

    def __call__(self, moved: Callable[[], object] = lambda: None) -> dict[str, float]:
        """`eval/generated...`, over all ranks (collective)."""
        answers = self.answers(moved)
        right = [
            next(iter(question.benchmark.judge(question.sample, answer.text).values()))
            for question, answer in zip(self.questions, answers, strict=True)
        ]
        ranks = dist.gather_on_host((len(answers), sum(right), sum(answer.hit_limit for answer in answers)))
        samples, correct, endless = (sum(column) for column in zip(*ranks, strict=True))
        return {
            "eval/generated": float(samples),
            "eval/generated_accuracy": correct / samples,
            "eval/generated_at_limit": endless / samples,
        }


@contextmanager
def _plain_attention(language_model: Any) -> Iterator[None]:
    """Attention that knows a cache: that of packed rows does not."""
    before = language_model.config._attn_implementation
    language_model.config._attn_implementation = "sdpa"
    try:
        yield
    finally:
        language_model.config._attn_implementation = before


def build_free_answers(recipe: Recipe, encoding: Encoding, held_out: Mixture, networks: Networks) -> FreeAnswers | None:
    """What `evaluation.generate_samples` asks for; the same samples in each evaluation. Raises UserError where too few
    can be judged."""
    if not recipe.evaluation.generate_samples:
        return None
    count, reader = recipe.evaluation.generate_samples, MixtureReader(held_out)
    # chosen once: a read that fails on one rank must not leave it with other samples or another limit than the rest
    lengths = dist.decided_by_main(lambda: _usable(reader, encoding, count))
    world = dist.world_size()
    whole = len(lengths) // world * world
    if not whole:
        raise UserError(
            f"evaluation.generate_samples: {counted(len(lengths), 'sample')} of {held_out.location} can be judged, "
            f"and each of {counted(world, 'rank')} needs one; raise it, or set it to 0"
        )
    questions = [_read_question(reader, encoding, number) for number in list(lengths)[dist.rank() : whole : world]]
    tokenizer, special = encoding.encoder.tokenizer, encoding.special
    ends = {special.im_end, tokenizer.get_vocab().get("<|endoftext|>")} - {None}
    reasoner = Reasoner(
        model=networks.student.module.model,
        tower=networks.vision,  # type: ignore[arg-type]
        encoder=encoding.encoder,
        latent_size=recipe.model.latent_size,
        stop_ids=tuple(sorted(ends)),
        device=dist.device(),
    )
    limit = ROOM * max(lengths.values())
    return FreeAnswers(reasoner, questions, GenerationSettings(max_new_tokens=limit))


def _usable(reader: MixtureReader, encoding: Encoding, count: int) -> dict[int, int]:
    """Numbers of at most `count` samples, evenly from all of the data, and the lengths of their references; those that
    cannot be read or judged are left out."""
    lengths = {}
    for number in np.unique(np.linspace(0, len(reader) - 1, min(count, len(reader))).astype(int)).tolist():
        try:
            lengths[number] = _read_question(reader, encoding, number).length
        except (SampleError, DamagedSampleError):  # the teacher-forced evaluation counts it
            continue
    return lengths


def _read_question(reader: MixtureReader, encoding: Encoding, number: int) -> Question:
    """A sample as a question. Raises SampleError where it cannot be used or judged, UserError where not be read."""
    sample = reader.read(number)
    whole, prompt = encoding.encoder(sample), encoding.encoder.prompt(sample)
    return Question(sample, prompt, _benchmark(sample), len(whole.input_ids) - whole.assistant)


def _benchmark(sample: Sample) -> Benchmark:
    """By what the sample's answer can be judged; raises SampleError where there is nothing."""
    *others, last = map(find_benchmark, BENCHMARKS)
    for benchmark in others:
        try:
            benchmark.check(sample)
        except SampleError:
            continue
        return benchmark
    last.check(sample)
    return last
