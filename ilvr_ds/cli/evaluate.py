"""`evaluate`."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from ilvr_ds.cli.answering import add_answering, run_answering
from ilvr_ds.cli.generate import add_generation, generation_settings
from ilvr_ds.cli.options import Commands


def add_evaluate(commands: Commands) -> None:
    """The options of `evaluate`."""
    command = commands.add_parser("evaluate", help="answer and score a packed data set; resumes where it was killed")
    add_generation(command)
    command.add_argument(
        "--benchmark", required=True,
        help="comt, ilvr, option-letter, vsp or exact-match on --shards; published ones: vstar, mmvp, blink, hrbench, "
        "mme-realworld-lite",
    )  # fmt: skip
    command.add_argument("--shards", default="", help="data set that `pack` wrote")
    command.add_argument("--data", help="published benchmark's data set: a copy, or its hub name (default: the usual)")
    command.add_argument("--mode", default="auto", help="latent, cot or direct (default: latent, cot without latents)")
    command.add_argument("--instruction", metavar="TEXT", help="behind each question (default: what the mode asks for)")
    command.add_argument("--output", type=Path, help="folder to write (default: MODEL/evaluation/BENCHMARK)")
    command.add_argument("--batch-size", type=int, default=16, help="answers at a time on each rank (default 16)")
    command.add_argument("--max-samples", type=int, help="only this many samples, the first (default: all)")
    command.add_argument("--ablate-latents", action="store_true", help="again with other latents, and with none")
    command.add_argument(
        "--compare-pixels", type=int, default=0, metavar="N", help="cost against helper images as pixels, on N answers"
    )
    command.add_argument("--tracking-uri", default=os.environ.get("MLFLOW_TRACKING_URI"), help="MLflow for the scores")
    command.add_argument("--experiment", help="MLflow experiment (default: below the training run, else evaluation)")
    add_answering(command)
    command.set_defaults(run=_evaluate)


def _evaluate(options: argparse.Namespace) -> int:
    from ilvr_ds.evaluation.evaluate import evaluate
    from ilvr_ds.evaluation.preparation import EvaluationSettings

    settings = EvaluationSettings(
        model=options.model,
        shards=options.shards,
        benchmark=options.benchmark,
        data=options.data,
        output=options.output,
        batch_size=options.batch_size,
        max_samples=options.max_samples,
        latent_size=options.latent_size,
        mode=options.mode,
        instruction=options.instruction,
        precision=options.precision,
        max_image_pixels=options.max_image_pixels,
        ablate_latents=options.ablate_latents,
        compare_pixels=options.compare_pixels,
        generation=generation_settings(options),
        tracking_uri=options.tracking_uri,
        experiment=options.experiment,
    )
    return run_answering(options, lambda: evaluate(settings))
