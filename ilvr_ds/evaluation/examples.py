"""Answers for a table: the text with its latent segments marked, and the images of the question."""

from __future__ import annotations

from typing import Any

from PIL import Image

from ilvr_ds.data.decode import decode_image
from ilvr_ds.data.sample import Sample
from ilvr_ds.evaluation.benchmarks import Benchmark
from ilvr_ds.evaluation.results import Line
from ilvr_ds.generation.answers import Answer
from ilvr_ds.generation.loading import Reasoner

HEIGHT = 224
"""Of the image in a row, in pixels."""


def marked_text(reasoner: Reasoner, answer: Answer) -> str:
    """The answer with `[segment 1: 8 latents]` where the latents were."""
    first, *others = texts_around_latents(reasoner, answer)
    marks = [f" [segment {m}: {steps} latents] " for m, steps in enumerate(answer.steps, start=1)]
    return "".join([first, *(part for pair in zip(marks, others, strict=True) for part in pair)]).strip()


def texts_around_latents(reasoner: Reasoner, answer: Answer) -> list[str]:
    """The text before each latent segment, and behind the last; without special tokens."""
    special, tokenizer = reasoner.special, reasoner.encoder.tokenizer
    pieces: list[list[int]] = [[]]
    for token in answer.tokens:
        if token == special.latent_start:
            pieces.append([])
        elif token not in (special.latent_pad, special.latent_end):
            pieces[-1].append(token)
    return [str(tokenizer.decode(piece, skip_special_tokens=True)) for piece in pieces]


def example(line: Line, sample: Sample, benchmark: Benchmark) -> dict[str, Any]:
    """A row of the table; `answer` is what the benchmark reads out of the text, `gold` the right one."""
    verdicts = {rule: verdict for rule, verdict in line["verdicts"].items() if isinstance(verdict, bool)}
    return {
        "images": side_by_side(sample),
        "question": line["question"],
        "generated": line.get("marked", line["response"]),
        "answer": benchmark.answer(sample, line["response"]),
        "gold": str(line["answer"]),
        "right": ", ".join(f"{rule}: {'yes' if right else 'no'}" for rule, right in verdicts.items()),
        "type": line["type"],
        "id": line["id"],
    }


def side_by_side(sample: Sample) -> Image.Image:
    """The input images in one row, HEIGHT high; a thin white strip where there are none."""
    images = [decode_image(data) for data in sample.input_images]
    sized = [image.resize((max(1, round(image.width * HEIGHT / image.height)), HEIGHT)) for image in images]
    row = Image.new("RGB", (max(8, sum(image.width + 8 for image in sized)), HEIGHT), "white")
    left = 0
    for image in sized:
        row.paste(image, (left, 0))
        left += image.width + 8
    return row
