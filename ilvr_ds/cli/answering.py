"""What `evaluate` and `audit` share: commands that answer a whole data set on all ranks."""

from __future__ import annotations

import argparse
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ilvr_ds.cli.generate import add_generation, generation_settings
from ilvr_ds.config import LIMITS
from ilvr_ds.errors import UserError

if TYPE_CHECKING:
    from ilvr_ds.evaluation.preparation import EvaluationSettings

logger = logging.getLogger("ilvr_ds")
_COMMON = (
    "model", "shards", "benchmark", "data", "output", "batch_size", "max_samples", "latent_size", "precision",
    "max_image_pixels", "tracking_uri", "experiment",
)  # fmt: skip
"""Fields of EvaluationSettings that have the names of their options."""


def add_answering(command: argparse.ArgumentParser, folder: str, limit: str) -> None:
    """The options of both.

    folder: where results go below MODEL/evaluation. limit: the option that takes the first samples only.
    """
    add_generation(command)
    command.add_argument(
        "--benchmark",
        help="how answers are judged, without a default: comt, ilvr, option-letter, vsp or exact-match on --shards; "
        "published ones: vstar, mmvp, blink, hrbench, mme-realworld-lite",
    )
    command.add_argument("--shards", default="", help="data set that `pack` wrote")
    command.add_argument("--data", help="published benchmark's data set: a copy, or its hub name (default: the usual)")
    command.add_argument("--output", type=Path, help=f"folder to write (default: MODEL/evaluation/{folder})")
    command.add_argument("--batch-size", type=int, default=16, help="answers at a time on each rank (default 16)")
    command.add_argument(
        limit, dest="max_samples", type=int, metavar="N", help="only this many samples, the first (default: all)"
    )
    command.add_argument("--tracking-uri", default=os.environ.get("MLFLOW_TRACKING_URI"), help="MLflow for the scores")
    command.add_argument("--experiment", help="MLflow experiment (default: below the training run, else evaluation)")
    command.add_argument(
        "--stop-exit-code", type=int, default=0, metavar="N",
        help="after a signal asked to stop; what was answered is kept (default 0, as run.stop_exit_code)",
    )  # fmt: skip
    command.set_defaults(by_ranks=True, limit=limit)


def evaluation_settings(options: argparse.Namespace, **more: Any) -> EvaluationSettings:
    """What `add_answering` added, checked, and `more`. Raises UserError."""
    from ilvr_ds.evaluation.preparation import EvaluationSettings

    if options.benchmark is None:  # no default: data do not say it, and another's rule misreads in silence
        raise UserError(
            "--benchmark: is missing, and data do not say how answers to them are judged; give --benchmark "
            "option-letter for questions with options (the demo's), comt for CoMT's own judge, or another of --help"
        )
    if options.max_samples is not None and options.max_samples < 1:
        raise UserError(f"{options.limit} {options.max_samples}: must be 1 or more")
    least, most = LIMITS["run.stop_exit_code"]
    if not least <= options.stop_exit_code <= most:
        raise UserError(f"--stop-exit-code {options.stop_exit_code}: must be from {least} to {most}")
    common = {name: getattr(options, name) for name in _COMMON}
    return EvaluationSettings(**common, generation=generation_settings(options), **more)


def run_answering(options: argparse.Namespace, work: Callable[[], list[str]]) -> int:
    """Print the lines of `work` on the main rank; returns the exit code, another one where a signal stopped it."""
    from ilvr_ds import dist
    from ilvr_ds.evaluation.batches import Stopped

    try:
        lines = work()
    except Stopped as stopped:
        logger.info("%s", stopped)
        dist.barrier()  # a scheduler that sees the exit code of one rank may kill the others: leave together
        dist.close()
        return int(options.stop_exit_code)
    if os.environ.get("RANK", "0") == "0":
        print("\n".join(lines))
    return 0
