"""`generate`, and the options of every command that generates answers."""

from __future__ import annotations

import argparse
import logging
import os
import sys
from dataclasses import replace
from math import inf
from pathlib import Path
from typing import TYPE_CHECKING

from ilvr_ds.cli.data import FORMATS
from ilvr_ds.cli.options import Commands, add_command, check_max_image_pixels
from ilvr_ds.errors import UserError, counted

if TYPE_CHECKING:
    from ilvr_ds.generation.loading import Reasoner
    from ilvr_ds.generation.settings import GenerationSettings
    from ilvr_ds.pictures.views import SampleView

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
    from ilvr_ds.generation.settings import GenerationSettings

    if options.max_new_tokens < 1 or not 0 <= options.temperature < inf or not 0 < options.top_p <= 1:
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
    command = add_command(commands, "generate", "answer a question, a file of questions or a chat", "serving.md")
    add_generation(command)
    asked = command.add_mutually_exclusive_group(required=True)
    asked.add_argument("--question", help="may hold <image> where the images stand")
    asked.add_argument(
        "--questions", type=Path, metavar="FILE", help="of records as `pack` reads them; docs/formats.md"
    )
    asked.add_argument("--chat", action="store_true", help="ask one question after another, until an empty line")
    command.add_argument("--image", type=Path, action="append", default=[], help="input image; may be given again")
    command.add_argument("--show-latents", type=Path, metavar="FILE.png", help="draw where each latent looks")
    of_file = command.add_argument_group("of a file of questions")
    of_file.add_argument("--image-root", type=Path, help="folder of the image paths (default: the file's folder)")
    of_file.add_argument("--format", choices=FORMATS, default="auto")
    of_file.add_argument("--output", type=Path, metavar="FILE", help="JSON Lines to write (default: standard output)")
    of_file.add_argument("--batch-size", type=int, default=8, help="answers at a time (default 8)")
    command.add_argument("--tracking-uri", default=os.environ.get("MLFLOW_TRACKING_URI"), help="MLflow of models:/")
    command.set_defaults(run=_generate)


def _generate(options: argparse.Namespace) -> int:
    settings = generation_settings(options)
    _check_together(options)
    if options.questions:
        return _answer_file(options, settings)
    return _chat(options, settings) if options.chat else _answer(options, settings)


def _check_together(options: argparse.Namespace) -> None:
    """Raise UserError for options that do not go together."""
    if options.batch_size < 1:
        raise UserError(f"--batch-size must be 1 or more, not {options.batch_size}")
    if options.questions is None:
        for name in ("image_root", "output"):
            if getattr(options, name):
                raise UserError(f"--{name.replace('_', '-')}: is for a file of questions; give one by --questions")
        if options.format != "auto":
            raise UserError("--format: is for a file of questions; give one by --questions")
    elif options.image:
        raise UserError(f"--image {options.image[0]}: the records of --questions name their images themselves")
    if options.show_latents and not (options.question and options.image):
        raise UserError("--show-latents: draws the latents of one answer over its images; give --question and --image")
    if options.show_latents and options.show_latents.suffix != ".png":
        raise UserError(f"--show-latents {options.show_latents}: is written as PNG; give a name that ends in .png")


def load_chosen(options: argparse.Namespace) -> Reasoner:
    """The model of `add_generation` and `--tracking-uri`. Raises UserError."""
    from ilvr_ds import dist
    from ilvr_ds.generation.loading import load_reasoner
    from ilvr_ds.tracking.registry import find_model

    model = find_model(options.model, options.tracking_uri)
    return load_reasoner(model, dist.device(), options.precision, options.latent_size, options.max_image_pixels)


def _answer(options: argparse.Namespace, settings: GenerationSettings) -> int:
    """One question, its answer shown as it comes."""
    from ilvr_ds.data.sample import SampleError
    from ilvr_ds.evaluation.question import ask
    from ilvr_ds.generation.generate import Generator

    sample = ask(options.question, options.image)
    reasoner = load_chosen(options)
    settings = replace(settings, keep_latents=bool(options.show_latents))
    try:
        prompt = reasoner.encoder.prompt(sample)
    except SampleError as error:
        raise UserError(f"--question: {error}") from error
    generated = Generator(reasoner, settings, on_text=lambda row, piece: _show(piece))([prompt])
    print()
    logger.info("%s", generated.summary())
    if options.show_latents:
        from ilvr_ds.audit.report.answer import answer_view

        named = replace(sample, id=", ".join(path.name for path in options.image))
        _draw(
            answer_view(reasoner, named, prompt, generated.answers[0], Path(options.model).name), options.show_latents
        )
    return 0


def _draw(view: SampleView, path: Path) -> None:
    from ilvr_ds.pictures.selection import draw_latents

    if not view.segments:
        logger.warning("%s: not written: the answer has no latent segment", path)
        return
    try:
        draw_latents(view, None, path)
    except OSError as error:
        raise UserError(f"--show-latents {path}: cannot be written ({error.strerror})") from error
    logger.info("where each latent looks: %s", path)


def _answer_file(options: argparse.Namespace, settings: GenerationSettings) -> int:
    """A line of JSON for each question."""
    from ilvr_ds.serving.questions import Questions, answers, check_output, check_questions, json_line, write_answers

    questions = Questions(options.questions, options.image_root or options.questions.parent, options.format)
    if options.output:
        check_output(options.output)
    next(iter(questions), None)  # a file that cannot be read is said before a model is loaded
    reasoner = load_chosen(options)
    logger.info("%s: %s", options.questions, counted(check_questions(reasoner, questions), "question"))
    lines = answers(reasoner, settings, questions, options.batch_size)
    if options.output:
        write_answers(lines, options.output)
        return 0
    for line in lines:
        print(json_line(line), flush=True)
    return 0


def _chat(options: argparse.Namespace, settings: GenerationSettings) -> int:
    """Questions from standard input until one is empty; one that cannot be asked is said, and the next is taken."""
    from ilvr_ds.data.sample import SampleError
    from ilvr_ds.evaluation.question import read_images
    from ilvr_ds.serving.chat import Chat

    images = read_images(options.image)
    chat = Chat(load_chosen(options), settings, images, _show)
    while question := _next_question():
        try:
            generated = chat.ask(question)
        except SampleError as error:
            logger.warning("this cannot be asked: %s", error)
            continue
        print(flush=True)
        logger.info("%s", generated.summary())
        if not chat.is_kept(generated.answers[0].text):
            logger.warning("this question and its answer, which holds no text or reserved tokens, are not remembered")
    return 0


def _next_question() -> str:
    """ "" at the end."""
    try:
        return input("> " if sys.stdin.isatty() else "").strip()
    except (EOFError, KeyboardInterrupt):
        return ""


def _show(piece: str) -> None:
    print(piece, end="", flush=True)
