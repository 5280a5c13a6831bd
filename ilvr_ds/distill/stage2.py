"""Stage 2: latents are the student's own hidden states, and it learns from the text alone.

Letters: B samples of the micro-batch, T tokens, L supervised tokens, M segments, K latent slots, D.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ilvr_ds.data.window import MicroBatch
from ilvr_ds.distill.text import text_sums
from ilvr_ds.model.cached_attention import use_cached_attention
from ilvr_ds.model.injection import write_images
from ilvr_ds.model.latent_pass import LatentPasses
from ilvr_ds.model.loss_head import use_loss_head
from ilvr_ds.model.rollout import roll_out


class StageTwo(nn.Module):
    """The student's network with its loss: the root module of its engine.

    The loss is a sum; the caller divides by the count of the whole optimizer step on all ranks. Micro-batches whose
    layouts have equally many rounds make the same module calls, so that ZeRO-3 stays in step.
    """

    def __init__(
        self,
        model: Any,
        latent_size: int,
        activation_checkpointing: bool,
        logits_chunk: int,
        has_recorded_latents: bool = False,
        sums_in_fp32: bool = True,
    ) -> None:
        super().__init__()
        use_loss_head(model, sums_in_fp32)
        self.model = model
        self.latent_size = latent_size
        self.activation_checkpointing = activation_checkpointing
        self.logits_chunk = logits_chunk
        use_cached_attention(model.model.language_model)
        passes = LatentPasses(model.model.language_model, sums_in_fp32) if has_recorded_latents else None
        self.latent_passes = passes

    def forward(self, micro: MicroBatch, features: Tensor) -> dict[str, Tensor]:
        """What text_sums says of one micro-batch; and latents [M, K, D], detached, of the segments that it counts.

        features [F, D]: merged image features of the window, of which the input images' are written in.
        """
        hidden = self.hidden(micro, features).flatten(0, 1)
        losses, best = self.model.lm_head(hidden[micro.label_rows], micro.label_ids, self.logits_chunk)
        latents = hidden[micro.latent_slots.flatten() - 1].detach()
        sums = text_sums(losses, best, micro)
        return {"latents": latents.view(*micro.latent_slots.shape, hidden.shape[1]), **sums}

    def hidden(self, micro: MicroBatch, features: Tensor) -> Tensor:
        """Last hidden state [B, T, D] with images written in and latents fed back."""
        assert micro.rollout is not None, "collate with free_latents"
        language_model = self.model.model.language_model
        embeddings = language_model.embed_tokens(micro.tokens.input_ids)
        embeddings = write_images(embeddings, micro.tokens, features)
        thrifty = self.activation_checkpointing and self.training
        return roll_out(
            language_model, embeddings, micro.tokens, micro.rollout, self.latent_size, thrifty, self.latent_passes
        )
