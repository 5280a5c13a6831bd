"""`evaluate`."""

from __future__ import annotations

import argparse

from ilvr_ds.cli.answering import add_answering, evaluation_settings, run_answering
from ilvr_ds.cli.options import Commands, add_command


def add_evaluate(commands: Commands) -> None:
    """The options of `evaluate`."""
    command = add_command(
        commands, "evaluate", "answer and score a packed data set; resumes where it was killed", "evaluation.md"
    )
    add_answering(command, "BENCHMARK", "--max-samples")
    command.add_argument("--mode", default="auto", help="latent, cot or direct (default: latent, cot without latents)")
    command.add_argument("--instruction", metavar="TEXT", help="behind each question (default: what the mode asks for)")
    command.add_argument("--ablate-latents", action="store_true", help="again with other latents, and with none")
    command.add_argument(
        "--compare-pixels", type=int, default=0, metavar="N", help="cost against helper images as pixels, on N answers"
    )
    command.set_defaults(run=_evaluate)


def _evaluate(options: argparse.Namespace) -> int:
    from ilvr_ds.evaluation.evaluate import evaluate

    settings = evaluation_settings(
        options,
        mode=options.mode,
        instruction=options.instruction,
        ablate_latents=options.ablate_latents,
        compare_pixels=options.compare_pixels,
    )
    return run_answering(options, lambda: evaluate(settings))
