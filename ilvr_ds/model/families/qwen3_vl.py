"""Qwen3-VL, dense: queries and keys have norms, rotations interleave the three axes, and *deepstack*.

Deepstack: some of the tower's blocks have mergers of their own, and the language model adds what they give to its
hidden states at the image positions, one behind each of its first layers. A row of features holds it behind the merged
feature of the last block: width D, then D for each of these layers.

Latents get nothing added. They are embeddings as text is; the candidates that teach them are merged features of the
last block, and a generated latent, which is a hidden state, has no picture whose blocks could be asked.

Letters: R rows of T tokens, N image tokens, D hidden size.
"""

from __future__ import annotations

from math import isqrt
from typing import Any

from torch import Tensor
from transformers import Qwen3VLForConditionalGeneration
from transformers.models.qwen3_vl import modeling_qwen3_vl as modeling

from ilvr_ds.data.images import VisionLayout
from ilvr_ds.model.families.family import Family


class Qwen3VL(Family):
    """2B to 32B."""

    name = "qwen3_vl"
    title = "Qwen3-VL"
    modeling = modeling
    model = Qwen3VLForConditionalGeneration
    text_model = modeling.Qwen3VLTextModel
    tower = modeling.Qwen3VLVisionModel
    norms = modeling.Qwen3VLTextRMSNorm
    gated = (modeling.Qwen3VLTextMLP,)
    rotate = staticmethod(modeling.apply_rotary_pos_emb)
    rotate_vision = staticmethod(modeling.apply_rotary_pos_emb_vision)
    tower_settings = (
        "depth", "hidden_size", "num_heads", "hidden_act", "deepstack_visual_indexes", "out_hidden_size",
    )  # fmt: skip
    loaded_by = "5"
    adds_features = True

    def layout(self, vision_config: Any) -> VisionLayout:
        """Without windows; positions are learnt on a square grid that is resampled to each image's."""
        side = isqrt(vision_config.num_position_embeddings)
        return VisionLayout(vision_config.patch_size, vision_config.spatial_merge_size, 0, side)

    def feature_width(self, vision_config: Any) -> int:
        """The merged feature, and one of each block that deepstack takes."""
        return int(vision_config.out_hidden_size * (1 + len(vision_config.deepstack_visual_indexes)))

    def leave_out_tower(self, vision_config: Any) -> None:
        """No blocks, and no mergers but the last."""
        vision_config.depth = 0
        vision_config.deepstack_visual_indexes = []

    def mask_argument(self, mask: Tensor | None) -> Any:
        """As it is. Of one with two dimensions, for flash-attn, transformers reads a value on the device."""
        return mask

    def added_arguments(self, language_model: Any, slots: Tensor, added: tuple[Tensor, ...]) -> dict[str, Any]:
        """`slots` in the place of a mask, for `add_rows`: transformers' own addition finds positions by a mask, for
        which the host waits."""
        language_model._deepstack_process = self.add_rows
        return {"visual_pos_masks": slots, "deepstack_visual_embeds": list(added)}

    def queries(self, attention: Any, hidden: Tensor) -> Tensor:
        """[..., D] -> [..., heads, d], normalised as the layer does."""
        queries: Tensor = attention.q_norm(attention.q_proj(hidden).unflatten(-1, (-1, attention.head_dim)))
        return queries

    def keys(self, attention: Any, hidden: Tensor) -> Tensor:
        """[..., D] -> [..., key-value heads, d], normalised as the layer does."""
        keys: Tensor = attention.k_norm(attention.k_proj(hidden).unflatten(-1, (-1, attention.head_dim)))
        return keys

    def hub_name(self, name: str) -> str:
        """`model.visual.*`, `model.language_model.*` and `lm_head.*`."""
        if name.startswith("visual."):
            return f"model.{name}"
        return name.replace("model.", "model.language_model.", 1) if name.startswith("model.") else name

    def released_config(self, content: dict[str, Any]) -> dict[str, Any]:
        """The rotation in `rope_theta` and `rope_scaling`."""
        text = content["text_config"]
        rope = text.pop("rope_parameters")
        text["rope_theta"] = rope.pop("rope_theta")
        text["rope_scaling"] = {**rope, "mrope_interleaved": True}
        return content
