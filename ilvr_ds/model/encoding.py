"""Builds what makes windows of samples under a recipe: tokenizer, image processor, model sizes; no weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from ilvr_ds.config import Recipe
from ilvr_ds.data.collate import Collator
from ilvr_ds.data.features import FeatureSet
from ilvr_ds.data.images import ImageEncoder, VisionLayout
from ilvr_ds.data.loader import Numbers, WindowDataset
from ilvr_ds.data.mixture import Mixture, MixtureFeatures, MixtureReader
from ilvr_ds.data.reader import ShardReader
from ilvr_ds.data.shards import ShardSet
from ilvr_ds.data.template import SampleEncoder
from ilvr_ds.data.tokens import SpecialTokens, load_tokenizer
from ilvr_ds.model.student import load_config, vision_layout


@dataclass(frozen=True)
class Encoding:
    """How samples become tokens, for a recipe."""

    encoder: SampleEncoder
    special: SpecialTokens
    layout: VisionLayout
    model_config: Any


def build_encoding(recipe: Recipe) -> Encoding:
    """Tokenizer, image processor and model configuration of `model.path`; reads no weights."""
    config = load_config(recipe.model.path)
    tokenizer, special = load_tokenizer(recipe.model.path)
    images = ImageEncoder(recipe.model.path, recipe.data.max_image_pixels, recipe.data.blank_images)
    size, longest = recipe.model.latent_size, recipe.data.max_tokens
    encoder = SampleEncoder(
        tokenizer, special, images, size, longest,
        with_helpers=recipe.has_targets, with_pixels=not recipe.data.has_features,
    )  # fmt: skip
    return Encoding(encoder, special, vision_layout(config), config)


def build_dataset(
    recipe: Recipe,
    encoding: Encoding,
    data: ShardSet | Mixture,
    numbers_of: Callable[[int], Sequence[Numbers]],
    types: tuple[str, ...] = (),
    features: FeatureSet | MixtureFeatures | None = None,
    by_set: bool = False,
) -> WindowDataset:
    """Windows of packed data under a recipe, with stored features where the recipe has them.

    numbers_of: sample numbers of each micro-batch of a step. types: the kinds of task by which losses are split;
    by_set: they are split by the sets of a mixture, too.
    """
    collator = Collator(
        encoding.special,
        encoding.layout,
        recipe.model.latent_size,
        recipe.selection.group_size,
        "packed" if recipe.packs else recipe.data.padding_side,
        recipe.train.has_free_latents,
        types,
        recipe.selection.pool,
        recipe.selection.compare,
        data.starts if isinstance(data, Mixture) and by_set and data.named else None,
    )
    reader = MixtureReader(data) if isinstance(data, Mixture) else ShardReader(data)
    return WindowDataset(reader, encoding.encoder, collator, numbers_of, features)
