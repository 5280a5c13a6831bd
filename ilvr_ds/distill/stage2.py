"""Stage 2: the student reads its own hidden states as latents. It learns to predict the text and, where there is a
teacher, the features that it selects.

How far gradients go back through the latents that were fed back, `train.latent_gradient`:
    full        the whole chain: one rollout with gradients, model/rollout.py
    detached    not at all: a rollout without gradients makes the latents, and one pass over all tokens reads them
    N           along at most N of them one after the other. In that pass each latent has the gradient of the state that
                it is, which comes from a pass before, and so on N times; the first reads latents without gradients

Letters: R rows of T tokens, M segments, X segments whether they have targets or not, K latent slots, D.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from ilvr_ds.config import LossConfig
from ilvr_ds.data.rollout import RolloutLayout
from ilvr_ds.data.window import MicroBatch
from ilvr_ds.distill.selection import Targets
from ilvr_ds.distill.stage1 import Negatives, Student
from ilvr_ds.model.injection import last_hidden, write_latents
from ilvr_ds.model.latent_pass import LatentPasses
from ilvr_ds.model.layers.cached_attention import cached_attention, use_cached_attention
from ilvr_ds.model.rollout import own_latents, roll_out


class StageTwo(Student):
    """Reads its own latents.

    Micro-batches whose layouts have equally many rounds make the same module calls, so that ZeRO-3 stays in step.
    checkpoints_activations: of the rollout with gradients, whose layers are not checkpointed otherwise.
    """

    def __init__(
        self,
        model: Any,
        settings: LossConfig,
        seed: int,
        latent_size: int,
        latent_gradient: Literal["full", "detached"] | int,
        checkpoints_activations: bool = False,
        has_recorded_latents: bool = False,
        sums_in_fp32: bool = True,
    ) -> None:
        super().__init__(model, settings, seed, sums_in_fp32)
        self.latent_size = latent_size
        self.latent_gradient = latent_gradient
        self.checkpoints_activations = checkpoints_activations
        language_model = model.model.language_model
        has_whole_chain = latent_gradient == "full"
        if has_whole_chain:
            use_cached_attention(language_model)
        passes = LatentPasses(language_model, sums_in_fp32, has_whole_chain) if has_recorded_latents else None
        self.latent_passes = passes

    def forward(
        self,
        micro: MicroBatch,
        features: Tensor,
        targets: Targets | None = None,
        step: int = 0,
        foreign: Negatives | None = None,
    ) -> dict[str, Tensor]:
        """Loss sums of one micro-batch: text_sums and, with targets, alignment and contrastive; and prediction
        [M, K, D], detached: its own latents, of the segments that the micro-batch counts.

        features [F, D or more]: image features of the window. step: optimizer step, a part of the noise's counter.
        """
        return self._sums(self.hidden(micro, features), micro, targets, step, foreign)

    def hidden(self, micro: MicroBatch, features: Tensor) -> Tensor:
        """Last hidden state [R, T, D] with images written in and latents fed back."""
        layout = micro.rollout
        assert layout is not None, "collate with free_latents"
        language_model = self.model.model.language_model
        embeddings = self._embeddings(micro, features)
        if self.latent_gradient == "full":
            checkpoints_activations = self.checkpoints_activations and self.training
            return roll_out(
                language_model,
                embeddings,
                micro.tokens,
                layout,
                self.latent_size,
                checkpoints_activations,
                self.latent_passes,
                features,
            )
        with cached_attention(language_model):
            latents = own_latents(
                language_model, embeddings, micro.tokens, layout, self.latent_size, self.latent_passes, features
            )
        hidden = self._read(micro, features, embeddings, layout.slots, latents)
        for _ in range(self._links(layout)):
            fed = hidden.flatten(0, 1)[layout.slots.flatten() - 1].view_as(latents)
            hidden = self._read(micro, features, embeddings, layout.slots, latents + (fed - fed.detach()))
        return hidden

    def _links(self, layout: RolloutLayout) -> int:
        """How many latents a gradient may pass one after the other: no more than there are, the same on all ranks."""
        if self.latent_gradient in ("full", "detached") or not torch.is_grad_enabled():
            return 0
        return min(int(self.latent_gradient), layout.rounds * self.latent_size)

    def _read(self, micro: MicroBatch, features: Tensor, embeddings: Tensor, slots: Tensor, latents: Tensor) -> Tensor:
        """Last hidden state [R, T, D] with `latents` [X, K, D] at `slots`."""
        is_set = torch.ones_like(slots, dtype=torch.bool)
        embeddings = write_latents(embeddings, slots, latents, is_set)
        return last_hidden(self.model.model.language_model, micro.tokens, embeddings, features=features)
