"""What a model would have been taught: targets of helper images, selected as in training, by the model as its teacher
where the selection asks for one.

The audited weights take the teacher's place: a momentum teacher ends up close to its student, and is not exported.

K latent slots of a segment, P candidates of a helper image, D features.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ilvr_ds.config import SelectionConfig
from ilvr_ds.data.collate import Collator
from ilvr_ds.data.sample import Sample, SampleError
from ilvr_ds.data.template import EncodedSample
from ilvr_ds.distill.query import ContextEncoder
from ilvr_ds.distill.selector import Selector
from ilvr_ds.generation.loading import Reasoner
from ilvr_ds.model.student import vision_layout

logger = logging.getLogger("ilvr_ds")


@dataclass(frozen=True)
class Chosen:
    """Of one sample with helper images: its segments' candidates, and which of them are the targets."""

    candidates: tuple[Tensor, ...] = ()
    """Of each segment [P, D]"""
    rows: tuple[tuple[int, ...], ...] = ()
    """Of each segment the candidates that are the targets of its first slots"""

    def latents(self, latent_size: int, filler: Tensor) -> list[Tensor]:
        """What training feeds: the targets, and `filler` [D] at slots without one; [K, D] of each segment."""
        fed = []
        for candidates, rows in zip(self.candidates, self.rows, strict=True):
            rest = filler.to(candidates).expand(latent_size - len(rows), -1)
            fed.append(torch.cat([candidates[list(rows)], rest]))
        return fed


def targets_alone(fed: Sequence[Tensor], filler: Tensor) -> list[Tensor]:
    """Of what `Chosen.latents` feeds, [K, D] of each segment, the targets [kept, D]: `filler` is the same everywhere,
    and would make samples look alike."""
    return [segment[(segment != filler.to(segment)).any(1)] for segment in fed]


class TargetChooser:
    """Selects the targets of batches of samples."""

    def __init__(self, reasoner: Reasoner, selection: SelectionConfig) -> None:
        self.reasoner = reasoner
        self.selection = selection
        self.collator = Collator(
            reasoner.special,
            vision_layout(reasoner.model.config),
            reasoner.latent_size,
            selection.group_size,
            "right",
            pool=selection.pool,
            compare=selection.compare,
        )
        width = reasoner.model.get_input_embeddings().weight.shape[1]
        self.selector = Selector(selection, reasoner.latent_size, width)
        self.teacher = ContextEncoder(reasoner.model.model.language_model) if selection.needs_query else None

    @torch.inference_mode()
    def __call__(self, samples: Sequence[Sample]) -> list[Chosen]:
        """Of each sample; nothing where it has no helper image, or (with selection.pool region) no regions."""
        encoded = [self._encode(sample) for sample in samples]
        places = [place for place, sample in enumerate(encoded) if sample is not None]
        chosen = [Chosen()] * len(samples)
        for place, found in zip(places, self._choose([s for s in encoded if s is not None]), strict=True):
            chosen[place] = found
        return chosen

    def _encode(self, sample: Sample) -> EncodedSample | None:
        if not sample.helper_images:
            return None
        try:
            encoded = self.reasoner.encoder(sample)
        except SampleError as error:
            logger.warning("sample %s: no targets: %s", sample.id, error)
            return None
        return None if self.selection.pool == "region" and None in encoded.regions else encoded

    def _choose(self, encoded: list[EncodedSample]) -> list[Chosen]:
        if not encoded:
            return []
        window = self.collator(encoded, np.arange(len(encoded)), [1] * len(encoded)).to(self.reasoner.device)
        features = torch.cat([self.reasoner.tower(images) for images in window.images])
        context = self.teacher(window.tokens, features, window.context) if self.teacher else None
        targets = self.selector(window, features, context)
        candidates, offsets, indices = targets.candidates, targets.offsets.tolist(), targets.indices.tolist()
        found = []
        for micro in window.micro_batches:
            segments = micro.segments.tolist()
            found.append(
                Chosen(
                    tuple(candidates[offsets[w] : offsets[w + 1]] for w in segments),
                    tuple(tuple(row - offsets[w] for row in indices[w] if row >= 0) for w in segments),
                )
            )
        return found
