"""`generate`, and the options of every command that generates answers."""

from __future__ import annotations

import argparse
import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING

from ilvr_ds.cli.options import Commands, check_max_image_pixels
from ilvr_ds.errors import UserError

if TYPE_CHECKING:
    from ilvr_ds.evaluation.generate import GenerationSettings

logger = logging.getLogger("ilvr_ds")


def add_generation(command: argparse.ArgumentParser) -> None:
    """Model and sampling; `generation_settings` checks them."""
    command.add_argument(
        "--model", required=True, help="folder that `export` wrote, a released model, or models:/NAME/VERSION"
    )
    command.add_argument("--latent-size", type=int, help="latent steps of a segment (default: the model's)")
    command.add_argument("--precision", choices=["auto", "fp32", "bf16", "fp16"], default="auto")
    command.add_argument("--max-image-pixels", type=int, help="of an image (default: the model's, which export sets)")
    command.add_argument("--max-new-tokens", type=int, default=1024, help="including latent steps (default 1024)")
    command.add_argument("--temperature", type=float, default=0.0, help="0 is greedy (default)")
    command.add_argument("--top-p", type=float, default=1.0)
    command.add_argument("--seed", type=int, default=0)
    command.add_argument("--stop", action="append", default=[], metavar="TEXT", help="end after this text")


def generation_settings(options: argparse.Namespace) -> GenerationSettings:
    """What `add_generation` added. Raises UserError."""
    from ilvr_ds.evaluation.generate import GenerationSettings

    if options.max_new_tokens < 1 or options.temperature < 0 or not 0 < options.top_p <= 1:
        raise UserError("--max-new-tokens must be 1 or more, --temperature 0 or more, --top-p above 0 and at most 1")
    if "" in options.stop:
        raise UserError("--stop: is empty; give a text, or leave it out")
    if options.seed < 0:
        raise UserError(f"--seed {options.seed}: must be 0 or more")
    check_max_image_pixels(options)
    return GenerationSettings(
        options.max_new_tokens, options.temperature, options.top_p, options.seed, tuple(options.stop)
    )


def add_generate(commands: Commands) -> None:
    """The options of `generate`."""
    command = commands.add_parser("generate", help="answer a question with a trained model")
    add_generation(command)
    command.add_argument("--image", type=Path, action="append", default=[], help="input image; may be given again")
    command.add_argument("--question", required=True, help="may hold <image> where the images stand")
    command.add_argument("--tracking-uri", default=os.environ.get("MLFLOW_TRACKING_URI"), help="MLflow of models:/")
    command.set_defaults(run=_generate)


def _generate(options: argparse.Namespace) -> int:
    from ilvr_ds import dist
    from ilvr_ds.data.sample import SampleError
    from ilvr_ds.evaluation.generate import Generator
    from ilvr_ds.evaluation.loading import load_reasoner
    from ilvr_ds.evaluation.question import ask
    from ilvr_ds.tracking.registry import find_model

    settings = generation_settings(options)
    sample = ask(options.question, options.image)
    model = find_model(options.model, options.tracking_uri)
    reasoner = load_reasoner(model, dist.device(), options.precision, options.latent_size, options.max_image_pixels)
    stream = Generator(reasoner, settings, on_text=lambda row, piece: print(piece, end="", flush=True))
    try:
        prompt = reasoner.encoder.prompt(sample)
    except SampleError as error:
        raise UserError(f"--question: {error}") from error
    generated = stream([prompt])
    print()
    logger.info("%s", generated.summary())
    return 0
