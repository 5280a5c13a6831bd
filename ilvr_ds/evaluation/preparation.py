"""What an evaluation and an audit begin with: options that are checked, a data set, a model, and batches of samples."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

from ilvr_ds import dist
from ilvr_ds.base_model import commit_of, model_on_host
from ilvr_ds.data.sample import Sample, SampleError
from ilvr_ds.data.template import EncodedSample
from ilvr_ds.errors import UserError
from ilvr_ds.evaluation.benchmarks import Benchmark, find_benchmark
from ilvr_ds.evaluation.modes import AUTO, Mode, check_mode, choose_mode, instruction_of
from ilvr_ds.evaluation.report import left_out_lines
from ilvr_ds.evaluation.samples import Samples, open_samples
from ilvr_ds.generation.loading import Reasoner, load_reasoner, speaking_of_the_option
from ilvr_ds.generation.settings import GenerationSettings
from ilvr_ds.tracking.registry import is_reference, resolve
from ilvr_ds.tracking.scores import check_address

logger = logging.getLogger("ilvr_ds")


@dataclass(frozen=True)
class EvaluationSettings:
    """What to evaluate and how."""

    model: str
    shards: str
    """A packed data set; "" for a published benchmark, which prepare() replaces by where that lies."""
    benchmark: str
    data: str | None = None
    """A copy of a published benchmark's data set, or its name on the hub; None: the usual one."""
    output: Path | None = None
    """None: MODEL/evaluation/BENCHMARK, for a hub's model evaluation/NAME/BENCHMARK; other modes than latent have
    theirs behind it."""
    batch_size: int = 16
    max_samples: int | None = None
    latent_size: int | None = None
    precision: str = "auto"
    max_image_pixels: int | None = None
    """None: the model's own limit."""
    ablate_latents: bool = False
    mode: str = AUTO
    """A mode, or AUTO: latent where the model has latent tokens, else cot."""
    instruction: str | None = None
    """What stands behind each question; None: what the mode says."""
    compare_pixels: int = 0
    """Samples of each rank on which the cost is compared with the interleaved baseline."""
    generation: GenerationSettings = field(default_factory=GenerationSettings)
    tracking_uri: str | None = None
    experiment: str | None = None
    """MLflow experiment; None: that of the model's training run, as a child of it, else "evaluation"."""


@dataclass(frozen=True)
class Prepared:
    """Everything that can be wrong is right by now; nothing has been written."""

    settings: EvaluationSettings
    """With the folder of a registered model in place of its reference."""
    reference: str | None
    """The registered model that was named."""
    benchmark: Benchmark
    reader: Samples
    numbers: list[int]
    """In the data set, of the samples that are evaluated."""
    left_out: dict[int, str]
    """Why the others are not."""
    folder: Path
    """Of the model, a hub's too."""
    reasoner: Reasoner
    mode: Mode
    instruction: str
    """Behind each question, on a line of its own; "" for nothing."""

    @property
    def title(self) -> str:
        """The benchmark, and the mode where it is not latent: under this name results stand side by side."""
        name = self.benchmark.name
        return name if self.mode == "latent" else f"{name}-{self.mode}"

    def prompt(self, sample: Sample) -> EncodedSample:
        """What stands before the answer; raises UserError where the sample does not fit."""
        try:
            asked = f"{sample.question}\n{self.instruction}" if self.instruction else sample.question
            return self.reasoner.encoder.prompt(replace(sample, question=asked))
        except SampleError as error:
            raise UserError(f"sample {sample.id} of {self.reader.location}: {error}; pack the data again") from error

    def batch(self, places: range) -> tuple[list[int], list[Sample], list[EncodedSample]]:
        """Numbers, samples and prompts at `places` of the evaluated ones."""
        numbers = self.numbers[places.start : places.stop]
        samples = [self.reader.read(number) for number in numbers]
        return numbers, samples, [self.prompt(sample) for sample in samples]

    def asked(self, number: int) -> tuple[int, Sample, EncodedSample]:
        """Number, sample and prompt of one of the evaluated samples."""
        sample = self.reader.read(number)
        return number, sample, self.prompt(sample)

    def identity(self) -> dict[str, Any]:
        """What must be the same when the work goes on."""
        settings = self.settings
        weights = sorted([*self.folder.glob("*.safetensors"), *self.folder.glob("*.bin")])
        commit = commit_of(settings.model, str(self.folder))  # each node has a hub's files from a time of its own
        return {
            "model": str(self.folder.resolve()) if Path(settings.model).is_dir() else settings.model,
            "weights": [[file.name, file.stat().st_size, commit or file.stat().st_mtime_ns] for file in weights],
            "data": self.reader.fingerprint,
            "samples": len(self.numbers),
            "benchmark": settings.benchmark,
            "batch_size": settings.batch_size,
            "latent_size": self.reasoner.latent_size,
            "precision": str(self.reasoner.model.dtype),
            "max_image_pixels": self.reasoner.encoder.images.max_pixels,
            "generation": {**settings.generation.__dict__, "stop": list(settings.generation.stop)},
            # left out where there is nothing to say, as in results from before there were modes
            **({} if self.mode == "latent" else {"mode": self.mode}),
            **({"instruction": self.instruction} if self.instruction else {}),
        }


def prepare(settings: EvaluationSettings, place: str) -> Prepared:
    """Check and load (collective over the launcher's ranks).

    place: what stands for the benchmark in the default output folder. Raises UserError for everything that a person
    can mend, before anything is written.
    """
    benchmark = find_benchmark(settings.benchmark)
    check_mode(settings.mode)
    if settings.batch_size < 1:
        raise UserError(f"--batch-size must be 1 or more, not {settings.batch_size}")
    dist.join_on_host(timedelta(days=2))
    if settings.tracking_uri:
        uri = settings.tracking_uri
        dist.decided_by_main(lambda: check_address(uri))
    reference = settings.model if is_reference(settings.model) else None
    if reference:
        folder = dist.decided_by_main(lambda: resolve(reference, settings.tracking_uri))
        settings = replace(settings, model=folder)
    reader = open_samples(benchmark, settings.shards, settings.data)
    settings = replace(settings, shards=settings.shards or reader.location)
    count = min(len(reader), settings.max_samples or len(reader))
    left_out = dist.decided_by_main(lambda: _left_out(reader, count, benchmark))
    with speaking_of_the_option():
        model = model_on_host(settings.model)
    reasoner = load_reasoner(
        model, dist.device(), settings.precision, settings.latent_size, settings.max_image_pixels,
        settings.mode != "latent",
    )  # fmt: skip
    mode = choose_mode(settings.mode, reasoner.special.has_latents)
    settings = _settled(settings, mode, place, reasoner)
    instruction = instruction_of(mode, benchmark.form) if settings.instruction is None else settings.instruction
    numbers = [number for number in range(count) if number not in left_out]
    return Prepared(
        settings, reference, benchmark, reader, numbers, left_out, Path(model), reasoner, mode, instruction
    )  # fmt: skip


def _settled(settings: EvaluationSettings, mode: Mode, place: str, reasoner: Reasoner) -> EvaluationSettings:
    """With an output folder, and outside the mode latent without segments. Raises UserError where they are needed."""
    if settings.output is None:
        name = place if mode == "latent" else f"{place}-{mode}"
        settings = replace(settings, output=default_output(settings.model, name))
    if mode == "latent":
        return settings
    if settings.ablate_latents:
        raise UserError(f"--ablate-latents: answers in mode {mode} have no latents to replace")
    if not reasoner.special.has_latents:
        return settings
    forbidden = (*settings.generation.forbidden, reasoner.special.latent_start)
    return replace(settings, generation=replace(settings.generation, forbidden=forbidden))


def default_output(model: str, benchmark: str) -> Path:
    """Where results go unless told otherwise: into the model's folder, or below one of this name for a hub's."""
    if Path(model).is_dir():
        return Path(model) / "evaluation" / benchmark
    return Path("evaluation") / model.replace("/", "--") / benchmark


def _left_out(reader: Samples, count: int, benchmark: Benchmark) -> dict[int, str]:
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
        raise UserError(f"{reader.location}: none of {count} samples can be scored; the first: {reasons[0]}")
    for line in left_out_lines(reasons):
        logger.warning("%s: %s", reader.location, line)
    return reasons
