"""`audit`."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from ilvr_ds.cli.answering import add_answering, run_answering
from ilvr_ds.cli.generate import add_generation, generation_settings
from ilvr_ds.cli.options import Commands


def add_audit(commands: Commands) -> None:
    """The options of `audit`."""
    command = commands.add_parser("audit", help="does a model use its latents? resumes where it was killed")
    add_generation(command)
    command.add_argument("--shards", required=True, help="data set that `pack` wrote")
    command.add_argument("--benchmark", default="comt", help="as in `evaluate` (default comt)")
    command.add_argument(
        "--tests", default="replacement,donor,inside,barred", help="with commas between (default: all)"
    )
    command.add_argument("--samples", type=int, help="only this many samples, the first (default: all)")
    command.add_argument("--output", type=Path, help="folder to write (default: MODEL/evaluation/audit-BENCHMARK)")
    command.add_argument("--batch-size", type=int, default=16, help="answers at a time on each rank (default 16)")
    command.add_argument(
        "--set", action="append", default=[], metavar="selection.KEY=VALUE",
        help="how targets are selected (default: as the run that `export` noted in the model)",
    )  # fmt: skip
    command.add_argument("--tracking-uri", default=os.environ.get("MLFLOW_TRACKING_URI"), help="MLflow for the scores")
    command.add_argument("--experiment", help="MLflow experiment (default: below the training run, else evaluation)")
    add_answering(command)
    command.set_defaults(run=_audit)


def _audit(options: argparse.Namespace) -> int:
    from ilvr_ds.audit.command import audit
    from ilvr_ds.audit.settings import AuditSettings, parse_tests
    from ilvr_ds.evaluation.preparation import EvaluationSettings

    tests = parse_tests(options.tests)
    evaluation = EvaluationSettings(
        model=options.model,
        shards=options.shards,
        benchmark=options.benchmark,
        mode="latent",
        output=options.output,
        batch_size=options.batch_size,
        max_samples=options.samples,
        latent_size=options.latent_size,
        precision=options.precision,
        max_image_pixels=options.max_image_pixels,
        generation=generation_settings(options),
        tracking_uri=options.tracking_uri,
        experiment=options.experiment,
    )
    return run_answering(options, lambda: audit(AuditSettings(evaluation, tests, tuple(options.set))))
