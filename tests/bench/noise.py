"""What the benchmark of a step works on: model folders without weights, and samples of noise in given sizes."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ilvr_ds.data.sample import LatentStep, Sample, TextStep
from ilvr_ds.demo.material import write_demo_model
from ilvr_ds.demo.task import TaskSpec
from tests.bench.geometry import TEXT

VISION = {"depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16,
          "fullatt_block_indexes": [7, 15, 23, 31]}  # fmt: skip
WORDS = ("red", "circle", "shape", "row", "image", "cell", "square", "left")
"""About one token each."""
CELL = 28
"""Pixels of a side of a merged patch."""


@dataclass(frozen=True)
class Sizes:
    """Of the samples of a geometry."""

    input_side: int
    helper_side: int
    question: int
    """Words"""
    span: int
    """Words of each text"""
    shortest: int
    """Tokens of a sample of mixed work, about"""
    longest: int


SIZES = {"real": Sizes(672, 448, 120, 60, 100, 1500), "demo": Sizes(112, 56, 12, 8, 60, 240)}


def write_geometry(folder: Path, name: str) -> None:
    """A model folder: the demo's own, or its tokenizer with the sizes of a Qwen2.5-VL and no weights."""
    write_demo_model(folder, TaskSpec(), "tiny")
    if name == "demo":
        return
    (folder / "model.safetensors").unlink()
    config = json.loads((folder / "config.json").read_text())
    text = config["text_config"]
    text.update(TEXT[name], max_window_layers=TEXT[name]["num_hidden_layers"], layer_types=None)
    text["rope_parameters"]["mrope_section"] = [16, 24, 24]
    config["tie_word_embeddings"] = text["tie_word_embeddings"] = name == "3b"
    config["vision_config"].update(VISION, out_hidden_size=TEXT[name]["hidden_size"])
    (folder / "config.json").write_text(json.dumps(config))


def draw_samples(work: str, sizes: Sizes, count: int) -> Iterator[Sample]:
    """`count` samples, always the same. work: comt (all alike) or mixed."""
    draw = np.random.default_rng(0)
    for number in range(count):
        yield _comt(draw, sizes, number) if work == "comt" else _mixed(draw, sizes, number)


def _comt(draw: np.random.Generator, sizes: Sizes, number: int) -> Sample:
    """One input image, three helper images, four texts."""
    helpers = [sizes.helper_side] * 3
    return _sample(draw, number, [sizes.input_side], helpers, sizes.question, [sizes.span] * 4)


def _mixed(draw: np.random.Generator, sizes: Sizes, number: int) -> Sample:
    """1 to 3 input images and 1 to 6 helper images; the length is drawn evenly on a logarithmic scale."""
    tokens = float(np.exp(draw.uniform(np.log(sizes.shortest), np.log(sizes.longest))))
    segments = int(draw.integers(1, max(2, min(7, tokens // 30 + 1))))
    inputs = int(draw.integers(1, 4))
    room = tokens - 10 * segments - 30  # latent slots and the template
    of_images = room * draw.uniform(0.2, 0.7)
    side = CELL * max(2, int((of_images / inputs) ** 0.5))
    words = max(2 * (segments + 2), int(room - inputs * (side // CELL) ** 2))
    parts = 1 + draw.multinomial(words - (segments + 2), draw.dirichlet(np.ones(segments + 2)))
    helpers = [CELL * int(draw.integers(2, sizes.helper_side // CELL + 1)) for _ in range(segments)]
    return _sample(draw, number, [side] * inputs, helpers, int(parts[0]), [int(part) for part in parts[1:]])


def _sample(
    draw: np.random.Generator, number: int, inputs: list[int], helpers: list[int], question: int, spans: list[int]
) -> Sample:
    """Noise images of given sides, and words: a text before each segment and one after the last."""

    def words(count: int) -> str:
        return " ".join(draw.choice(WORDS, count))

    steps: list[Any] = [TextStep(words(spans[0]))]
    for segment, span in enumerate(spans[1:]):
        steps += [LatentStep(segment), TextStep(words(span))]
    images = [tuple(_image(draw, side) for side in sides) for sides in (inputs, helpers)]
    return Sample(f"noise-{number}", words(question), tuple(steps), *images, answer="A")


def _image(draw: np.random.Generator, side: int) -> bytes:
    """A JPEG of coarse noise, about as large as a photograph of its size."""
    coarse = Image.fromarray(draw.integers(0, 255, (side // 7, side // 7, 3), dtype=np.uint8))
    buffer = io.BytesIO()
    coarse.resize((side, side), Image.Resampling.BILINEAR).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()
