"""Stage 1: the student reads the selected features as latents and learns to predict both the text and the features.

Letters: R rows of T tokens, L supervised tokens, M segments, K latent slots, S = M * K slots, D.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ilvr_ds.config import LossConfig
from ilvr_ds.data.window import MicroBatch
from ilvr_ds.distill.selection import Targets
from ilvr_ds.distill.text import sums_by_set, text_sums
from ilvr_ds.model.injection import last_hidden, write_images, write_latents
from ilvr_ds.model.layers.loss_head import use_loss_head
from ilvr_ds.ops.noise import gaussian_noise
from ilvr_ds.ops.selective_contrastive import selective_contrastive_loss


@dataclass(frozen=True)
class Negatives:
    """Candidates of other ranks that serve as negatives too (`loss.contrastive_negatives: world`)."""

    candidates: Tensor
    """[N', D]"""
    samples: Tensor
    """[N'] int64: number in the data of the sample of each"""


class Student(nn.Module):
    """The student's network with the losses of both stages: the root module of its engine.

    Losses are sums; the caller divides by the counts of the whole optimizer step on all ranks.
    """

    def __init__(self, model: Any, settings: LossConfig, seed: int, sums_in_fp32: bool = True) -> None:
        super().__init__()
        use_loss_head(model, sums_in_fp32)
        self.model = model
        self.settings = settings
        self.seed = seed

    def _sums(
        self, hidden: Tensor, micro: MicroBatch, targets: Targets | None, step: int, foreign: Negatives | None
    ) -> dict[str, Tensor]:
        """Loss sums of one micro-batch: text_sums and, with targets, alignment and contrastive, in a mixture also by
        set [sets]; and prediction [M, K, D], detached, of the segments that it counts.

        hidden [R, T, D]: last hidden state. step: optimizer step, a part of the noise's counter.
        """
        hidden = hidden.flatten(0, 1)
        losses, best = self.model.lm_head(hidden[micro.label_rows], micro.label_ids, self.settings.logits_chunk)
        prediction = hidden[micro.latent_slots.flatten() - 1]
        sums = {
            "prediction": prediction.detach().view(*micro.latent_slots.shape, hidden.shape[1]),
            **text_sums(losses, best, micro),
        }
        if targets is not None:
            alignment, contrastive = self._feature_losses(micro, prediction, targets, step, foreign)
            sums |= {"alignment": alignment.sum(), "contrastive": contrastive.sum()}
            if micro.segment_sets is not None:
                of_slot = micro.segment_sets.repeat_interleave(micro.latent_slots.shape[1])
                sums["alignment_by_set"] = sums_by_set(alignment, of_slot, micro)
                sums["contrastive_by_set"] = sums_by_set(contrastive, of_slot, micro)
        return sums

    def _embeddings(self, micro: MicroBatch, features: Tensor) -> Tensor:
        """[R, T, D] with images written in."""
        embeddings = self.model.model.language_model.embed_tokens(micro.tokens.input_ids)
        return write_images(embeddings, micro.tokens, features)

    def _feature_losses(
        self, micro: MicroBatch, prediction: Tensor, targets: Targets, step: int, foreign: Negatives | None
    ) -> tuple[Tensor, Tensor]:
        M, K = micro.latent_slots.shape
        slot = torch.arange(K, device=prediction.device)
        # by number in the data, not by row: a step of a mixture may hold a sample twice, which is no negative of itself
        candidates, offsets, samples = targets.candidates, targets.offsets, micro.noise_keys[:, 0]
        if foreign is not None:  # each a segment of its own, whose sample is known
            count = torch.arange(1, len(foreign.candidates) + 1, device=offsets.device)
            candidates = torch.cat([candidates, foreign.candidates])
            offsets = torch.cat([offsets, offsets[-1] + count])
            samples = torch.cat([samples, foreign.samples])
        noise = None
        if self.settings.target_noise_std and self.training:
            sample, segment = micro.noise_keys[:, None].expand(M, K, 2).unbind(-1)
            stream = torch.stack([sample, segment * K + slot], dim=-1).flatten(0, 1)
            noise = self.settings.target_noise_std * gaussian_noise(self.seed, step, stream, prediction.shape[1])
        return selective_contrastive_loss(
            prediction,
            candidates,
            target_index=targets.indices.flatten(),
            segment_of_slot=torch.arange(M, device=slot.device).repeat_interleave(K),
            candidate_offsets=offsets,
            selected=targets.indices,
            temperature=self.settings.contrastive_temperature,
            negatives="segment" if self.settings.contrastive_negatives == "segment" else "all",
            sample_of_segment=samples,
            noise=noise,
        )


class StageOne(Student):
    """Reads the selected features as latents.

    Every call makes the same module calls whatever the samples hold, so that ZeRO-3 stays in step on all ranks.
    """

    def forward(
        self, micro: MicroBatch, features: Tensor, targets: Targets, step: int, foreign: Negatives | None = None
    ) -> dict[str, Tensor]:
        """Loss sums of one micro-batch: alignment, contrastive and text_sums; and prediction [M, K, D], detached.

        features [F, D or more]: image features of the window. step: optimizer step, a part of the noise's counter.
        """
        return self._sums(self.hidden(micro, features, targets), micro, targets, step, foreign)

    def hidden(self, micro: MicroBatch, features: Tensor, targets: Targets) -> Tensor:
        """Last hidden state [R, T, D] with images and selected features written into the sequence."""
        embeddings = self._embeddings(micro, features)
        embeddings = write_latents(embeddings, micro.latent_slots, targets.values(), targets.indices >= 0)
        return last_hidden(self.model.model.language_model, micro.tokens, embeddings, features=features)
