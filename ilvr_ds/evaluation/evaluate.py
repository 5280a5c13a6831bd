"""An evaluation: every sample answered, judged and written down, on all ranks, and again from where it was killed.

The data set is cut into fixed batches; rank r answers batches r, r + world, ... A batch that was not finished is
answered again as a whole, so that what a sample gets, also from the other samples of its batch, never depends on
kills or on the number of ranks.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

from ilvr_ds import dist
from ilvr_ds.base_model import model_on_host
from ilvr_ds.data.reader import ShardReader
from ilvr_ds.data.sample import Sample, SampleError
from ilvr_ds.data.shards import open_dataset
from ilvr_ds.data.template import EncodedSample
from ilvr_ds.errors import UserError
from ilvr_ds.evaluation.ablation import CONDITIONS, latent_source
from ilvr_ds.evaluation.answers import Answer
from ilvr_ds.evaluation.benchmarks import Benchmark, find_benchmark
from ilvr_ds.evaluation.card import add_scores
from ilvr_ds.evaluation.charts import draw_scores
from ilvr_ds.evaluation.examples import example, marked_text
from ilvr_ds.evaluation.generate import GenerationSettings, Generator
from ilvr_ds.evaluation.loading import Reasoner, load_reasoner, speaking_of_the_option
from ilvr_ds.evaluation.pixels import replay_cost
from ilvr_ds.evaluation.report import left_out_lines, metrics_of, summarize
from ilvr_ds.evaluation.results import Line, Results, append
from ilvr_ds.tracking.registry import attach, is_reference, read_origin, resolve
from ilvr_ds.tracking.scores import check_address, log_scores

logger = logging.getLogger("ilvr_ds")
EXAMPLES = 50
"""Rows of the table in MLflow."""


@dataclass(frozen=True)
class EvaluationSettings:
    """What to evaluate and how."""

    model: str
    shards: str
    benchmark: str
    output: Path | None = None
    """None: MODEL/evaluation/BENCHMARK, for a hub's model evaluation/NAME/BENCHMARK."""
    batch_size: int = 16
    max_samples: int | None = None
    latent_size: int | None = None
    precision: str = "auto"
    max_image_pixels: int | None = None
    """None: the model's own limit."""
    ablate_latents: bool = False
    compare_pixels: int = 0
    """Samples of each rank on which the cost is compared with the interleaved baseline."""
    generation: GenerationSettings = field(default_factory=GenerationSettings)
    tracking_uri: str | None = None
    experiment: str | None = None
    """MLflow experiment; None: that of the model's training run, as a child of it, else "evaluation"."""


def evaluate(settings: EvaluationSettings) -> list[str]:
    """Evaluate on this rank (collective over the launcher's ranks); returns lines that say the scores.

    Raises UserError for everything that a person can mend, before anything is written.
    """
    benchmark = find_benchmark(settings.benchmark)
    _check_settings(settings)
    dist.join_on_host(timedelta(days=2))
    if settings.tracking_uri:
        uri = settings.tracking_uri
        dist.decided_by_main(lambda: check_address(uri, "--tracking-uri"))
    reference = settings.model if is_reference(settings.model) else None
    if reference:
        folder = dist.decided_by_main(lambda: resolve(reference, settings.tracking_uri))
        settings = replace(settings, model=folder, output=settings.output or default_output(folder, settings.benchmark))
    shards = open_dataset(settings.shards)
    reader = ShardReader(shards)
    count = min(len(reader), settings.max_samples or len(reader))
    left_out = dist.decided_by_main(lambda: _left_out(reader, count, benchmark))
    numbers = [number for number in range(count) if number not in left_out]
    with speaking_of_the_option():
        model = model_on_host(settings.model)
    reasoner = load_reasoner(model, dist.device(), settings.precision, settings.latent_size, settings.max_image_pixels)
    results = Results(settings.output or default_output(settings.model, settings.benchmark))
    identity = _identity(settings, Path(model), shards.fingerprint, len(numbers), reasoner)
    dist.decided_by_main(lambda: results.open(identity))
    done = dist.decided_by_main(lambda: {line["number"] for line in results.lines()})
    batches = cut_batches(len(numbers), settings.batch_size)
    run = _Run(settings, benchmark, reader, reasoner, numbers)
    mine = [batch for batch in batches[dist.rank() :: dist.world_size()] if not done.issuperset(run.numbers_of(batch))]
    logger.info("%s: %d samples, %d of them done", shards.location, len(numbers), len(done))
    with results.part(dist.rank()) as file:
        for number, batch in enumerate(mine, start=1):
            append(file, [line for line in run.answer(batch) if line["number"] not in done])
            logger.info("batch %d of %d", number, len(mine))
    dist.barrier()
    lines = dist.decided_by_main(lambda: _finish(settings, benchmark, results, identity, reader, reference, left_out))
    dist.close()
    return lines


def default_output(model: str, benchmark: str) -> Path:
    """Where results go unless told otherwise: into the model's folder, or below one of this name for a hub's."""
    if Path(model).is_dir():
        return Path(model) / "evaluation" / benchmark
    return Path("evaluation") / model.replace("/", "--") / benchmark


def cut_batches(count: int, size: int) -> list[range]:
    """Places 0..count-1 in runs of `size`; a single sample at the end joins the run before it."""
    starts = list(range(0, count, size))
    if len(starts) > 1 and size > 1 and count - starts[-1] == 1:
        starts.pop()
    return [range(start, stop) for start, stop in zip(starts, [*starts[1:], count], strict=True)]


@dataclass
class _Run:
    settings: EvaluationSettings
    benchmark: Benchmark
    reader: ShardReader
    reasoner: Reasoner
    numbers: list[int]
    """In the data set, of the samples that are evaluated."""
    compared: int = 0

    def numbers_of(self, batch: range) -> list[int]:
        """In the data set, of a batch."""
        return self.numbers[batch.start : batch.stop]

    def answer(self, batch: range) -> list[Line]:
        """The lines of a batch."""
        numbers = self.numbers_of(batch)
        samples = [self.reader.read(number) for number in numbers]
        prompts = [self._prompt(sample) for sample in samples]
        generation = GenerationSettings(
            **{**self.settings.generation.__dict__, "keep_latents": self.settings.ablate_latents}
        )
        own = Generator(self.reasoner, generation)(prompts)
        lines = [
            self._line(number, sample, answer) | {"speed": own.speed.to_dict() if number == numbers[0] else None}
            for number, sample, answer in zip(numbers, samples, own.answers, strict=True)
        ]
        if self.settings.ablate_latents:
            self._ablate(samples, prompts, own.answers, lines)
        for sample, answer, line in zip(samples, own.answers, lines, strict=True):
            if self.compared < self.settings.compare_pixels and sample.helper_images and answer.segments:
                line["cost"] = replay_cost(self.reasoner, sample, answer)
                self.compared += 1
        return lines

    def _prompt(self, sample: Sample) -> EncodedSample:
        try:
            return self.reasoner.encoder.prompt(sample)
        except SampleError as error:
            raise UserError(f"sample {sample.id} of {self.reader.location}: {error}; pack the data again") from error

    def _line(self, number: int, sample: Sample, answer: Answer) -> Line:
        return {
            "number": number,
            "id": sample.id,
            "type": sample.group,
            "question": sample.question,
            "answer": sample.answer,
            "options": len(self.benchmark.options(sample)),
            "response": answer.text,
            "marked": marked_text(self.reasoner, answer),
            "verdicts": self.benchmark.judge(sample, answer.text),
            "new_tokens": len(answer.tokens),
            "steps": list(answer.steps),
            "hit_limit": answer.hit_limit,
        }

    def _ablate(
        self, samples: list[Sample], prompts: list[EncodedSample], own: Sequence[Answer], lines: list[Line]
    ) -> None:
        for condition in CONDITIONS:
            source = latent_source(condition, self.reasoner, own, self.settings.generation.seed)
            answers = Generator(self.reasoner, self.settings.generation, source)(prompts).answers
            donors = getattr(source, "has_donor", [True] * len(samples))
            for sample, answer, line, has_donor in zip(samples, answers, lines, donors, strict=True):
                line.setdefault("ablation", {})[condition] = {
                    "response": answer.text,
                    "verdicts": self.benchmark.judge(sample, answer.text),
                    "has_donor": has_donor,
                }


def _check_settings(settings: EvaluationSettings) -> None:
    if settings.batch_size < 1 or settings.compare_pixels < 0:
        raise UserError("--batch-size must be 1 or more, --compare-pixels 0 or more")
    if settings.max_samples is not None and settings.max_samples < 1:
        raise UserError(f"--max-samples {settings.max_samples}: must be 1 or more")
    if settings.batch_size < 2 and settings.ablate_latents:
        raise UserError("--batch-size: --ablate-latents takes latents from other samples of a batch; give 2 or more")


def _left_out(reader: ShardReader, count: int, benchmark: Benchmark) -> dict[int, str]:
    """Numbers of samples that lack what they would be judged by, and why, before anything is answered.

    Raises UserError where no sample can be judged.
    """
    reasons = {}
    for number in range(count):
        sample = reader.read(number)
        try:
            benchmark.check(sample)
        except SampleError as error:
            reasons[number] = f"sample {sample.id} cannot be scored for {benchmark.name}: {error}"
    if reasons and len(reasons) == count:
        raise UserError(f"--shards: {reader.location}: none of {count} samples can be scored; the first: {reasons[0]}")
    for line in left_out_lines(reasons):
        logger.warning("%s: %s", reader.location, line)
    return reasons


def _identity(settings: EvaluationSettings, folder: Path, data: str, count: int, reasoner: Reasoner) -> dict[str, Any]:
    """What must be the same when an evaluation goes on; `folder`: of the model, a hub's too."""
    weights = sorted([*folder.glob("*.safetensors"), *folder.glob("*.bin")])
    return {
        "model": str(folder.resolve()) if Path(settings.model).is_dir() else settings.model,
        "weights": [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in weights],
        "data": data,
        "samples": count,
        "benchmark": settings.benchmark,
        "batch_size": settings.batch_size,
        "latent_size": reasoner.latent_size,
        "precision": str(reasoner.model.dtype),
        "max_image_pixels": reasoner.encoder.images.max_pixels,
        "ablate_latents": settings.ablate_latents,
        "compare_pixels": settings.compare_pixels,
        "generation": {**settings.generation.__dict__, "stop": list(settings.generation.stop)},
    }


def _finish(
    settings: EvaluationSettings,
    benchmark: Benchmark,
    results: Results,
    identity: dict[str, Any],
    reader: ShardReader,
    reference: str | None,
    left_out: dict[int, str],
) -> list[str]:
    """Scores, pictures and, where they go to MLflow, that too; `reference`: the registered model that was named."""
    lines = results.lines()
    scores, text = summarize(lines, benchmark, settings.compare_pixels > 0)
    text += left_out_lines(left_out)
    results.finish(lines, {"settings": identity, "left_out": len(left_out), **scores})
    carded = add_scores(Path(settings.model), benchmark.name, settings.shards, scores)
    pictures = draw_scores(scores, benchmark.name, results.folder)
    if settings.tracking_uri:
        examples = [example(line, reader.read(line["number"]), benchmark) for line in lines[:EXAMPLES]]
        origin = read_origin(settings.model)
        experiment = settings.experiment or origin.get("experiment") or "evaluation"
        parent = None if settings.experiment else origin.get("mlflow_run_id")
        name = f"{origin.get('run') or Path(settings.model).name}-{settings.benchmark}"
        params = {key: identity[key] for key in ("model", "data", "samples", "benchmark", "latent_size")}
        log_scores(
            settings.tracking_uri, experiment, name, params, metrics_of(scores), examples, pictures, parent
        )  # fmt: skip
    if reference:
        attach(reference, settings.tracking_uri, benchmark.name, metrics_of(scores))
    return [*text, f"answers and scores: {results.folder}", *([carded] if carded else [])]
