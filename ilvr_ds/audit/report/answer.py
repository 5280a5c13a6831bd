"""Where the latents of one answer look: each held against the patches of all input images.

An answer has no helper images. What is nearest in its input images is what can be shown of any question; it is no proof
that a latent stands for it. K latent slots, P merged patches, D features.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ilvr_ds.audit.report.views import segment_view
from ilvr_ds.data.decode import decode_image
from ilvr_ds.data.sample import Sample
from ilvr_ds.data.template import EncodedSample
from ilvr_ds.evaluation.examples import texts_around_latents
from ilvr_ds.generation.answers import Answer
from ilvr_ds.generation.loading import Reasoner
from ilvr_ds.pictures.views import SampleView, pixels_of


def answer_view(reasoner: Reasoner, sample: Sample, prompt: EncodedSample, answer: Answer, title: str) -> SampleView:
    """The segments of an answer whose latents were kept, over the input images of its question, side by side.

    title: what the picture is about, where a sample of a data set has its kind of task.
    """
    images = reasoner.encoder.images
    seen = [images.seen(data) for data in sample.input_images]
    patches = _patches(reasoner, prompt, [(image.height // images.cell, image.width // images.cell) for image in seen])
    picture, laid = _side_by_side(seen, patches, images.cell)
    name = "input image" if len(seen) == 1 else "input images"
    segments = [
        segment_view(text, picture.copy(), latents, laid, images.cell, name)
        for text, latents in zip(texts_around_latents(reasoner, answer), answer.latents, strict=False)
        if len(latents)
    ]
    inputs = tuple(pixels_of(decode_image(data)) for data in sample.input_images)
    return SampleView(sample.id, title, sample.question, answer.text, inputs, tuple(segments))


@torch.inference_mode()
def _patches(reasoner: Reasoner, prompt: EncodedSample, grids: Sequence[tuple[int, int]]) -> list[Tensor]:
    """Of each image [R, C, D]: what stands for its merged patches in the prompt."""
    features = reasoner.tower(reasoner.collate([prompt]).images[0])
    features = features[:, : reasoner.model.get_input_embeddings().weight.shape[1]].float().cpu()
    parts = features.split([rows * columns for rows, columns in grids])
    return [part.view(*grid, -1) for part, grid in zip(parts, grids, strict=True)]


def _side_by_side(seen: Sequence[Image.Image], patches: Sequence[Tensor], cell: int) -> tuple[Image.Image, Tensor]:
    """The images in a row on white, a column of patches apart, and their patches [P, D] in that picture's order.

    Rows of P where there is white are NaN.
    """
    rows = max(len(grid) for grid in patches)
    columns = sum(grid.shape[1] for grid in patches) + len(patches) - 1
    picture = Image.new("RGB", (columns * cell, rows * cell), "white")
    laid = torch.full((rows, columns, patches[0].shape[2]), np.nan)
    left = 0
    for image, grid in zip(seen, patches, strict=True):
        picture.paste(image, (left * cell, 0))
        laid[: grid.shape[0], left : left + grid.shape[1]] = grid
        left += grid.shape[1] + 1
    return picture, laid.flatten(0, 1)
