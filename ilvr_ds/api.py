"""The interface for programs: ask a trained model, judge answers, decode images, pack samples.

What is here stays; everything else in the package may move between versions. Mistakes raise `ilvr_ds.errors.UserError`,
whose message is one line.
"""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import inf
from pathlib import Path
from typing import TypeAlias

import torch
from PIL import ExifTags, Image
from torch import Tensor

from ilvr_ds import dist
from ilvr_ds.audit.report.answer import answer_view
from ilvr_ds.data.check import check_sample
from ilvr_ds.data.decode import decode_image
from ilvr_ds.data.sample import Sample, SampleError
from ilvr_ds.data.template import EncodedSample
from ilvr_ds.errors import UserError, first_line
from ilvr_ds.evaluation.benchmarks import find_benchmark
from ilvr_ds.evaluation.scoring import read_options
from ilvr_ds.generation.answers import Answer
from ilvr_ds.generation.generate import Generator
from ilvr_ds.generation.loading import Reasoner, load_reasoner
from ilvr_ds.generation.settings import GenerationSettings
from ilvr_ds.ingest.pack import pack_samples
from ilvr_ds.pictures.selection import draw_latents

__all__ = ["Model", "Reply", "decode_image", "judge", "load", "pack_samples"]

ImageLike: TypeAlias = str | Path | bytes | Image.Image
"""A file, the bytes of a JPEG, PNG or WebP file, or a picture in memory"""
_FILE_MODES = {mode: mode for mode in ("1", "L", "LA", "P", "RGB", "RGBA", "I;16")}
_FILE_MODES |= {"CMYK": "RGB", "YCbCr": "RGB", "HSV": "RGB", "RGBX": "RGB", "PA": "RGBA", "RGBa": "RGBA", "La": "LA"}
"""Pillow's modes, and those in which a PNG file holds them"""


@dataclass(frozen=True)
class Reply:
    """What a model said."""

    text: str
    """Without special tokens."""
    steps: tuple[int, ...]
    """Latent steps of each latent segment, in order; empty: it opened none."""
    is_whole: bool
    """False: it was cut off at the limit of tokens."""
    latents: tuple[Tensor, ...]
    """[steps, hidden size] on the CPU for each segment: what the model fed back to itself."""
    tokens: tuple[int, ...]
    """All emitted ids, latent ones and the one that ends the answer included."""


@dataclass(frozen=True)
class Model:
    """A trained model, ready to answer; `load` makes it."""

    reasoner: Reasoner

    def ask(
        self,
        images: ImageLike | Sequence[ImageLike],
        question: str,
        *,
        max_new_tokens: int = 1024,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int = 0,
        stop: Sequence[str] = (),
    ) -> Reply:
        """The answer to one question.

        images: none, one or several; they stand before the text, or at `<image>` markers in it. max_new_tokens counts
        latent steps too. temperature 0 is greedy. stop: texts after which the answer ends. Raises UserError.
        """
        return self.ask_all(
            [(images, question)], max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p, seed=seed,
            stop=stop,
        )[0]  # fmt: skip

    def ask_all(
        self,
        questions: Sequence[tuple[ImageLike | Sequence[ImageLike], str]],
        *,
        batch_size: int = 8,
        max_new_tokens: int = 1024,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int = 0,
        stop: Sequence[str] = (),
    ) -> list[Reply]:
        """The answers to (images, question) pairs, `batch_size` at a time, in order.

        An answer does not depend on the questions beside it. Raises UserError, before anything is answered, where one
        of the questions cannot be.
        """
        is_chance = 0 <= temperature < inf and 0 < top_p <= 1
        if batch_size < 1 or max_new_tokens < 1 or not is_chance or seed < 0 or "" in stop:
            raise UserError(
                "ask: batch_size and max_new_tokens must be 1 or more, temperature and seed 0 or more, top_p above 0 "
                "and at most 1, and no stop empty"
            )
        prompts = [self._prompt(number, *pair)[1] for number, pair in enumerate(questions, start=1)]
        settings = GenerationSettings(max_new_tokens, temperature, top_p, seed, tuple(stop), keep_latents=True)
        found = dict(Generator(self.reasoner, settings).stream(prompts, batch_size))
        answers = [found[number] for number in range(len(prompts))]
        return [
            Reply(answer.text, answer.steps, not answer.hit_limit, answer.latents, tuple(answer.tokens))
            for answer in answers
        ]

    def draw_latents(
        self, images: ImageLike | Sequence[ImageLike], question: str, reply: Reply, path: str | Path
    ) -> None:
        """Write a PNG file: the cosine of each latent of a reply to every patch of the images that were asked about.

        The nearest patch of each latent is outlined. Raises UserError where the reply has no latents, there is no image
        or the file cannot be written.
        """
        sample, prompt = self._prompt(1, images, question)
        if not sample.input_images or not any(map(len, reply.latents)):
            missing = "the reply has no latents" if sample.input_images else "there is no image to look at"
            raise UserError(f"draw_latents: {missing}; nothing to draw")
        answer = Answer(sample.id, reply.text, list(reply.tokens), reply.steps, not reply.is_whole, reply.latents)
        view = answer_view(self.reasoner, replace(sample, id=Path(path).stem), prompt, answer, "a reply")
        try:
            draw_latents(view, None, Path(path))
        except OSError as error:
            raise UserError(f"draw_latents: cannot write {path} ({error.strerror})") from error

    def _prompt(
        self, number: int, images: ImageLike | Sequence[ImageLike], question: str
    ) -> tuple[Sample, EncodedSample]:
        if isinstance(images, str | Path | bytes | Image.Image):
            images = [images]
        name = f"question {number}"
        try:
            sample = Sample(name, question, steps=(), input_images=tuple(_encoded(image) for image in images))
            if not question.strip():
                raise SampleError("it is empty")
            check_sample(sample)
            return sample, self.reasoner.encoder.prompt(sample)
        except OSError as error:
            raise UserError(f"{name}: cannot read {error.filename} ({error.strerror})") from error
        except SampleError as error:
            raise UserError(f"{name}: {error}") from error


def load(
    path: str | Path,
    *,
    device: str | torch.device | None = None,
    precision: str = "auto",
    latent_size: int | None = None,
    max_image_pixels: int | None = None,
    without_latents: bool = False,
) -> Model:
    """Load the model in the folder that `ilvr-ds export` wrote, or of a name on the hub.

    device None: the GPU, if there is one. precision: auto (bf16 on a GPU, fp32 elsewhere), fp32, bf16 or fp16.
    latent_size, max_image_pixels None: the model's own. without_latents: a base without latent tokens will do, which
    answers in text alone. Raises UserError where it cannot be loaded.
    """
    if precision not in ("auto", "fp32", "bf16", "fp16"):
        raise UserError(f"load: precision is '{precision}'; valid: auto, fp32, bf16, fp16")
    place = dist.device() if device is None else _device(device)
    try:
        return Model(load_reasoner(str(path), place, precision, latent_size, max_image_pixels, without_latents))
    except UserError as error:
        raise UserError(f"load: {str(error).replace('--model: ', '').replace('--', '')}") from error


def judge(response: str, answer: str, question: str = "", benchmark: str = "comt") -> dict[str, bool]:
    """Whether a response is right, by the name of each of a benchmark's rule sets, the main one first.

    question: where options are listed in it, an answer may be an option's letter or text. benchmark: as `ilvr-ds
    evaluate --benchmark` names them, but for vsp, whose answers are judged on a map. Raises UserError.
    """
    rules = find_benchmark(benchmark)
    options = json.dumps(read_options(question))  # published benchmarks look for them in the record alone
    sample = Sample("response", question, steps=(), answer=answer, meta={"options": options})
    try:
        rules.check(sample)
    except SampleError as error:
        raise UserError(f"judge: {benchmark}: {error}") from error
    return {name: verdict for name, verdict in rules.judge(sample, response).items() if isinstance(verdict, bool)}


def _device(name: str | torch.device) -> torch.device:
    """A device that is there; raises UserError."""
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:  # the second where torch was built without CUDA
        raise UserError(f"load: device is '{name}', which is not here ({first_line(error)})") from error


def _encoded(image: ImageLike) -> bytes:
    """The bytes of an image file; raises SampleError and OSError."""
    if isinstance(image, bytes):
        return image
    return _png(image) if isinstance(image, Image.Image) else Path(image).read_bytes()


def _png(image: Image.Image) -> bytes:
    """A picture in memory as a file, with the orientation that Pillow keeps beside it and would not write.

    Raises SampleError for a mode whose values have no known range, and where the picture cannot be read.
    """
    if (mode := _FILE_MODES.get(image.mode)) is None:
        raise SampleError(f"a picture of mode {image.mode}; give it as RGB, by image.convert")
    buffer, exif = io.BytesIO(), Image.Exif()
    try:
        exif[ExifTags.Base.Orientation] = image.getexif().get(ExifTags.Base.Orientation, 1)
        (image if image.mode == mode else image.convert(mode)).save(buffer, "PNG", exif=exif)
    except (OSError, ValueError) as error:
        raise SampleError(f"a picture in memory that cannot be read ({first_line(error)})") from error
    return buffer.getvalue()
