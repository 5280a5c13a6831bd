"""An evaluation: every sample answered, judged and written down, on all ranks, and again from where it was killed.

With a decoder (on a GPU) rank r answers samples r, r + world, ..., each by itself: a row that has ended is given the
next one. Without one, and where latents are ablated, the data set is cut into fixed batches, and rank r answers batches
r, r + world, ... A batch that was not finished is answered again as a whole, so that what a sample gets, also from the
other samples of its batch, never depends on kills or on the number of ranks.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ilvr_ds import dist
from ilvr_ds.data.sample import Sample
from ilvr_ds.data.template import EncodedSample
from ilvr_ds.errors import UserError
from ilvr_ds.evaluation.ablation import CONDITIONS, latent_source
from ilvr_ds.evaluation.ahead import ahead
from ilvr_ds.evaluation.batches import answer_batches, answer_stream
from ilvr_ds.evaluation.card import add_scores
from ilvr_ds.evaluation.charts import draw_scores
from ilvr_ds.evaluation.examples import example, marked_text
from ilvr_ds.evaluation.pixels import Cost, replay_cost
from ilvr_ds.evaluation.preparation import EvaluationSettings, Prepared, prepare
from ilvr_ds.evaluation.report import left_out_lines, metrics_of, summarize
from ilvr_ds.evaluation.results import Line, Results
from ilvr_ds.generation.answers import Answer
from ilvr_ds.generation.context import Context
from ilvr_ds.generation.generate import Generator
from ilvr_ds.generation.room import rows_that_fit
from ilvr_ds.generation.settings import GenerationSettings, Speed
from ilvr_ds.monitoring.run_lock import ANSWERING, run_lock
from ilvr_ds.monitoring.stop_signal import StopSignal
from ilvr_ds.tracking.registry import attach, mlflow_place
from ilvr_ds.tracking.scores import log_scores

EXAMPLES = 50
"""Rows of the table in MLflow."""


def evaluate(settings: EvaluationSettings) -> list[str]:
    """Evaluate on this rank (collective over the launcher's ranks); returns lines that say the scores.

    Raises UserError for everything that a person can mend, before anything is written; Stopped where a signal came.
    """
    _check_settings(settings)
    ready = prepare(settings, settings.benchmark)
    settings = ready.settings
    results = Results(ready.settings.output or Path())
    identity = ready.identity() | {"ablate_latents": settings.ablate_latents, "compare_pixels": settings.compare_pixels}
    with run_lock(results.folder, ANSWERING), StopSignal() as signal:
        dist.decided_by_main(lambda: results.open(identity))
        run = _Run(ready)
        if ready.reasoner.decoder is None or settings.ablate_latents:
            answer_batches(results, ready.numbers, settings.batch_size, run.answer, ready.reader.location, signal)
        else:
            answer_stream(results, ready.numbers, run.answers, ready.reader.location, signal)
        lines = dist.decided_by_main(lambda: _finish(ready, results, identity))
    dist.close()
    return lines


@dataclass
class _Run:
    ready: Prepared
    compared: int = 0

    def answer(self, batch: range) -> list[Line]:
        """The lines of a batch."""
        settings, reasoner = self.ready.settings, self.ready.reasoner
        numbers, samples, prompts = self.ready.batch(batch)
        generation = GenerationSettings(**{**settings.generation.__dict__, "keep_latents": settings.ablate_latents})
        own = Generator(reasoner, generation)(prompts)
        lines = [
            self._line(number, sample, answer) | {"speed": own.speed.to_dict() if number == numbers[0] else None}
            for number, sample, answer in zip(numbers, samples, own.answers, strict=True)
        ]
        if settings.ablate_latents:
            self._ablate(samples, prompts, own.answers, lines)
        for sample, answer, line in zip(samples, own.answers, lines, strict=True):
            if self._is_compared(sample, answer):
                line["cost"] = self._cost(sample, answer)
        return lines

    def answers(self, numbers: list[int]) -> Iterator[Line]:
        """The lines of samples as they are answered: a row that has ended is given the next one."""
        asked: dict[int, tuple[int, Sample]] = {}
        rows = self.ready.settings.batch_size

        def prompts() -> Iterator[EncodedSample]:
            for place, (number, sample, prompt) in enumerate(ahead(self.ready.asked, numbers, rows)):
                asked[place] = number, sample
                yield prompt

        compared: list[tuple[Sample, Answer, Line]] = []
        generator, before = Generator(self.ready.reasoner, self.ready.settings.generation), Speed()
        for place, answer in generator.stream(prompts(), rows):
            number, sample = asked.pop(place)
            speed, before = generator.speed - before, generator.speed
            line = self._line(number, sample, answer) | {"speed": speed.to_dict()}
            if self._is_compared(sample, answer):
                compared.append((sample, answer, line))
            else:
                yield line
        for sample, answer, line in compared:  # the rows are free again
            yield line | {"cost": self._cost(sample, answer)}

    def _is_compared(self, sample: Sample, answer: Answer) -> bool:
        wanted = self.ready.settings.compare_pixels > self.compared
        is_one = bool(wanted and sample.helper_images and answer.segments)
        self.compared += is_one
        return is_one

    def _cost(self, sample: Sample, answer: Answer) -> Cost:
        """Also at the batch that fills a GPU; on a CPU at the evaluation's."""
        reasoner, rows = self.ready.reasoner, self.ready.settings.batch_size
        if reasoner.decoder is not None and reasoner.device.type == "cuda":
            columns = len(self.ready.prompt(sample).input_ids) + len(answer.tokens)
            rows = rows_that_fit(reasoner.decoder, columns)
        return replay_cost(reasoner, sample, answer, rows)

    def _line(self, number: int, sample: Sample, answer: Answer) -> Line:
        return {
            "number": number,
            "id": sample.id,
            "type": sample.group,
            "question": sample.question,
            "answer": sample.answer,
            "options": len(self.ready.benchmark.options(sample)),
            "response": answer.text,
            "marked": marked_text(self.ready.reasoner, answer),
            "new_tokens": len(answer.tokens),
            "steps": list(answer.steps),
            "hit_limit": answer.hit_limit,
        }

    def _ablate(
        self, samples: list[Sample], prompts: list[EncodedSample], own: Sequence[Answer], lines: list[Line]
    ) -> None:
        generation = self.ready.settings.generation
        read = Context(self.ready.reasoner, prompts, generation.max_new_tokens)
        for condition in CONDITIONS:
            source = latent_source(condition, self.ready.reasoner, own, generation.seed)
            answers = Generator(self.ready.reasoner, generation, source)(prompts, read).answers
            donors = getattr(source, "has_donor", [True] * len(samples))
            for answer, line, has_donor in zip(answers, lines, donors, strict=True):
                line.setdefault("ablation", {})[condition] = {"response": answer.text, "has_donor": has_donor}


def _check_settings(settings: EvaluationSettings) -> None:
    if settings.compare_pixels < 0:
        raise UserError(f"--compare-pixels {settings.compare_pixels}: must be 0 or more")
    if settings.batch_size == 1 and settings.ablate_latents:
        raise UserError("--batch-size: --ablate-latents takes latents from other samples of a batch; give 2 or more")


def _judged(ready: Prepared, lines: list[Line]) -> list[Line]:
    """The lines with the verdicts of today's rules on what was answered whenever."""
    for line in lines:
        sample = ready.reader.read(line["number"])
        for answered in (line, *line.get("ablation", {}).values()):
            answered["verdicts"] = ready.benchmark.judge(sample, answered["response"])
    return lines


def _finish(ready: Prepared, results: Results, identity: dict[str, Any]) -> list[str]:
    """Scores, pictures and, where they go to MLflow, that too."""
    settings, benchmark, reader, left_out = ready.settings, ready.benchmark, ready.reader, ready.left_out
    lines = _judged(ready, results.lines())
    scores, text = summarize(lines, benchmark, settings.compare_pixels > 0)
    text += [f"answers in mode {ready.mode}" + (f", asked: {ready.instruction}" if ready.instruction else "")]
    text += left_out_lines(left_out)
    results.finish(lines, {"settings": identity, "left_out": len(left_out), **scores})
    carded = add_scores(Path(settings.model), ready.title, settings.shards, scores)
    pictures = draw_scores(scores, ready.title, results.folder)
    if settings.tracking_uri:
        examples = [example(line, reader.read(line["number"]), benchmark) for line in lines[:EXAMPLES]]
        experiment, parent, run = mlflow_place(settings.model, settings.experiment)
        params = {key: identity[key] for key in ("model", "data", "samples", "benchmark", "latent_size")}
        params["mode"] = ready.mode
        params["rules"] = ", ".join(f"{rule} {version}" for rule, version in benchmark.versions().items())
        log_scores(
            settings.tracking_uri, experiment, f"{run}-{ready.title}", params, metrics_of(scores), examples, pictures,
            parent,
        )  # fmt: skip
    if ready.reference:
        attach(ready.reference, settings.tracking_uri, ready.title, metrics_of(scores), benchmark.versions())
    return [*text, f"answers and scores: {results.folder}", *([carded] if carded else [])]
