from __future__ import annotations

import numpy as np
import torch

from ilvr_ds.audit.report.answer import answer_view
from ilvr_ds.data.sample import Sample
from ilvr_ds.generation.answers import Answer
from ilvr_ds.generation.loading import Reasoner
from tests.data.packing import noise_png


def test_a_latent_that_is_a_patch_is_nearest_to_it(latent_reasoner: Reasoner) -> None:
    """In the first image, in the second, and in its last row. Catches rows and columns, and images, mixed up."""
    reasoner, special = latent_reasoner, latent_reasoner.special
    cell = reasoner.encoder.images.cell
    sizes = [(5, 2), (2, 4)]  # columns and rows of patches
    data = tuple(noise_png((columns * cell, rows * cell)) for columns, rows in sizes)
    sample = Sample("s", "Which?", (), data)
    prompt = reasoner.encoder.prompt(sample)
    with torch.inference_mode():
        features = reasoner.tower(reasoner.collate([prompt]).images[0])
    wanted = [((1, 3), 8), ((0, 6), 10), ((3, 7), 17)]  # place in the picture, and among the patches of the prompt
    latents = torch.stack([features[n] * 3 for _, n in wanted])
    opened = [special.latent_start, *[special.latent_pad] * 3, special.latent_end]
    [letter] = reasoner.encoder.tokenizer("a", add_special_tokens=False)["input_ids"]
    cut_off = [special.latent_start]  # a segment without a step, at the limit of tokens
    answer = Answer("s", "aa", [letter, *opened, letter, *cut_off], (3, 0), True, (latents, latents[:0]))

    view = answer_view(reasoner, sample, prompt, answer, "tiny")
    [segment] = view.segments
    assert segment.text == "a" and segment.name == "input images" and len(view.inputs) == 2
    assert segment.latents.shape == (3, 4, 8), "a column of white stands between the images"
    assert np.isnan(segment.latents[:, :, 5]).all() and np.isnan(segment.latents[:, 2:, :5]).all()
    for values, (place, _) in zip(segment.latents, wanted, strict=True):
        assert np.unravel_index(np.nanargmax(values), values.shape) == place
        assert np.isclose(np.nanmax(values), 1, atol=1e-4)
