"""A few samples as pictures show them: each latent's cosine to every patch of its helper image.

K latent slots, P candidates, R x C merged patches.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.nn.functional import normalize

from ilvr_ds.audit.readings.targets import Chosen
from ilvr_ds.data.decode import decode_image
from ilvr_ds.data.images import ImageEncoder
from ilvr_ds.data.sample import Sample, texts_before_latents
from ilvr_ds.pictures.views import SampleView, SegmentView, pixels_of


def view_of(sample: Sample, latents: Sequence[Tensor], chosen: Chosen, images: ImageEncoder) -> SampleView:
    """A sample with candidates, as far as its answer has segments; `latents` [K, D] of each."""
    texts = texts_before_latents(sample)
    segments = [
        segment_view(text, images.seen(helper), own, candidates, images.cell)
        for text, helper, own, candidates in zip(texts, sample.helper_images, latents, chosen.candidates, strict=False)
    ]
    inputs = tuple(pixels_of(decode_image(data)) for data in sample.input_images)
    return SampleView(sample.id, sample.group, sample.question, sample.answer, inputs, tuple(segments))


def segment_view(
    text: str, seen: Image.Image, latents: Tensor, candidates: Tensor, cell: int, name: str = ""
) -> SegmentView:
    """Cosines of `latents` [K, D] to `candidates` [P, D] of a picture as the tower sees it, in cells of so many pixels.

    text: what stands before the segment. name: what the picture is, if not a helper image.
    """
    grid = seen.height // cell, seen.width // cell
    cosines = normalize(latents.float(), dim=-1) @ normalize(candidates.float().cpu(), dim=-1).T
    return SegmentView(text, pixels_of(seen), _map(cosines.numpy(), grid), name=name)


def _map(cosines: NDArray[np.float32], grid: tuple[int, int]) -> NDArray[np.float32]:
    """[K, R, C] of cosines [K, P] to candidates, each of a run of patches; NaN where patches were dropped."""
    patches, candidates = grid[0] * grid[1], cosines.shape[1]
    run = patches // candidates
    flat = np.full((len(cosines), patches), np.nan, dtype=np.float32)
    flat[:, : run * candidates] = np.repeat(cosines, run, axis=1)
    return flat.reshape(len(cosines), *grid)
