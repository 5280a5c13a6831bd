"""What the benchmark of a step works on: model folders without weights, and samples of noise in given sizes."""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ilvr_ds.data.sample import LatentStep, Sample, TextStep
from ilvr_ds.demo.material import write_demo_model
from ilvr_ds.demo.task import TaskSpec
from ilvr_ds.model.families import FAMILIES
from ilvr_ds.model.student import load_config

WORDS = ("red", "circle", "shape", "row", "image", "cell", "square", "left")
"""About one token each."""
DEMOS = {"demo": "qwen2_5_vl", "demo-qwen3vl": "qwen3_vl"}
"""Geometries of the demo's own models, and their families"""
TOKEN_IDS = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
TEXT_TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


@dataclass(frozen=True)
class Sizes:
    """Of the samples of a geometry."""

    input_side: int
    """Cells, merged patches: so all families have equally many tokens"""
    helper_side: int
    question: int
    """Words"""
    span: int
    """Words of each text"""
    shortest: int
    """Tokens of a sample of mixed work, about"""
    longest: int


SIZES = {"real": Sizes(24, 16, 120, 60, 100, 1500), "demo": Sizes(4, 2, 12, 8, 60, 240)}


def sizes_of(geometry: str) -> Sizes:
    """Those of the samples for a model."""
    return SIZES["demo" if geometry in DEMOS else "real"]


def write_geometry(folder: Path, name: str) -> None:
    """A model folder: the demo's own, or its tokenizer with the sizes of a released model and no weights."""
    if name in DEMOS:
        write_demo_model(folder, TaskSpec(), "tiny", family=DEMOS[name])
        return
    family = next(family for family in FAMILIES if name in family.releases)
    write_demo_model(folder, TaskSpec(), "tiny", family=family.name)
    (folder / "model.safetensors").unlink()
    tiny, config = load_config(str(folder)), family.config_of(family.releases[name])
    for ids, found, wanted in (
        (TOKEN_IDS, tiny, config),
        (TEXT_TOKEN_IDS, tiny.text_config, config.text_config),
    ):
        for key in ids:
            setattr(wanted, key, getattr(found, key))
    config.save_pretrained(folder)


def draw_samples(work: str, sizes: Sizes, count: int, cell: int = 28) -> Iterator[Sample]:
    """`count` samples, always the same. work: comt (all alike) or mixed. cell: pixels of its side."""
    draw = np.random.default_rng(0)
    for number in range(count):
        yield _comt(draw, sizes, number, cell) if work == "comt" else _mixed(draw, sizes, number, cell)


def _comt(draw: np.random.Generator, sizes: Sizes, number: int, cell: int) -> Sample:
    """One input image, three helper images, four texts."""
    inputs, helpers = [sizes.input_side * cell], [sizes.helper_side * cell] * 3
    return _sample(draw, number, inputs, helpers, sizes.question, [sizes.span] * 4)


def _mixed(draw: np.random.Generator, sizes: Sizes, number: int, cell: int) -> Sample:
    """1 to 3 input images and 1 to 6 helper images; the length is drawn evenly on a logarithmic scale."""
    tokens = float(np.exp(draw.uniform(np.log(sizes.shortest), np.log(sizes.longest))))
    segments = int(draw.integers(1, max(2, min(7, tokens // 30 + 1))))
    inputs = int(draw.integers(1, 4))
    room = tokens - 10 * segments - 30  # latent slots and the template
    of_images = room * draw.uniform(0.2, 0.7)
    cells = max(2, int((of_images / inputs) ** 0.5))
    words = max(2 * (segments + 2), int(room - inputs * cells**2))
    parts = 1 + draw.multinomial(words - (segments + 2), draw.dirichlet(np.ones(segments + 2)))
    helpers = [cell * int(draw.integers(2, sizes.helper_side + 1)) for _ in range(segments)]
    return _sample(draw, number, [cells * cell] * inputs, helpers, int(parts[0]), [int(part) for part in parts[1:]])


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
