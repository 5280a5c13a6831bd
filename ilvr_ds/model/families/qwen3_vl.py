"""Qwen3-VL, dense: queries and keys have norms, rotations interleave the three axes, and *deepstack*.

Deepstack: some of the tower's blocks have mergers of their own, and the language model adds what they give to its
hidden states at the image positions, one behind each of its first layers. A row of features holds it behind the merged
feature of the last block: width D, then D for each of these layers.

Latents get nothing added. They are embeddings as text is; the candidates that teach them are merged features of the
last block, and a generated latent, which is a hidden state, has no picture whose blocks could be asked.

Letters: R rows of T tokens, N image tokens, D hidden size.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import isqrt
from typing import Any

import torch
from torch import Tensor
from transformers import Qwen3VLForConditionalGeneration
from transformers.models.qwen3_vl import modeling_qwen3_vl as modeling

from ilvr_ds.data.images import VisionLayout
from ilvr_ds.model.families.family import TURNS, Family, Release

_SMALL_TOWER = {
    "depth": 24, "hidden_size": 1024, "intermediate_size": 4096, "num_heads": 16, "num_position_embeddings": 2304,
    "deepstack_visual_indexes": [5, 11, 17],
}  # fmt: skip
_LARGE_TOWER = {
    "depth": 27, "hidden_size": 1152, "intermediate_size": 4304, "num_heads": 16, "num_position_embeddings": 2304,
    "deepstack_visual_indexes": [8, 16, 24],
}  # fmt: skip


def _release(
    name: str, hidden: int, layers: int, heads: int, intermediate: int, tower: dict[str, Any], is_tied: bool = False
) -> Release:
    """The dense model of a size."""
    text = {
        "hidden_size": hidden, "num_hidden_layers": layers, "num_attention_heads": heads, "num_key_value_heads": 8,
        "head_dim": 128, "intermediate_size": intermediate, "vocab_size": 151_936, "max_position_embeddings": 262_144,
        "rope_parameters": {"rope_type": "default", "rope_theta": 5e6, "mrope_section": [24, 20, 20]},
    }  # fmt: skip
    return Release(f"Qwen/Qwen3-VL-{name}-Instruct", text, {**tower, "out_hidden_size": hidden}, is_tied)


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
    has_head_norms = True
    releases: Mapping[str, Release] = {
        "qwen3vl_2b": _release("2B", 2048, 28, 16, 6144, _SMALL_TOWER, is_tied=True),
        "qwen3vl_4b": _release("4B", 2560, 36, 32, 9728, _SMALL_TOWER, is_tied=True),
        "qwen3vl_8b": _release("8B", 4096, 36, 32, 12288, _LARGE_TOWER),
        "qwen3vl_32b": _release("32B", 5120, 64, 64, 25600, _LARGE_TOWER),
    }
    chat_template = TURNS
    """No system turn where nobody wrote one"""
    image_settings: Mapping[str, Any] = {
        "patch_size": 16,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
        "size": {"shortest_edge": 4 * 32 * 32, "longest_edge": 16384 * 32 * 32},
    }
    """As in the releases, but for the smallest image, which has 65,536 pixels there"""

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

    def tower_sizes(self, vision_config: Any) -> dict[str, Any]:
        """Every block attends to the whole image."""
        return {
            "full_attention_blocks": vision_config.depth,
            "deepstack": len(vision_config.deepstack_visual_indexes),
            "positions": vision_config.num_position_embeddings,
            "is_gated": False,
        }

    def tiny_config(self, text: dict[str, Any], vision: dict[str, Any], tokens: dict[str, int]) -> Any:
        """A tower of three blocks, of which two give features to deepstack; queries wider than D, as in the 4B."""
        head = 2 * text["hidden_size"] // text["num_attention_heads"]
        side = head // 2 * 5 // 16
        sections = [head // 2 - 2 * side, side, side]
        rope = {**text["rope_parameters"], "mrope_section": sections}
        return self.model.config_class(
            text_config={**text, "head_dim": head, "rope_parameters": rope},
            vision_config={
                **vision, "depth": 3, "deepstack_visual_indexes": [0, 1], "num_position_embeddings": 64,
            },
            **tokens,
        )  # fmt: skip

    def merger_layers(self, tower: Any) -> tuple[Any, Any]:
        """Of the last block's merger; a GELU lies between them."""
        return tower.merger.linear_fc1, tower.merger.linear_fc2

    def added_layers(self, tower: Any) -> list[Any]:
        """Of deepstack's mergers."""
        return [merger.linear_fc2 for merger in tower.deepstack_merger_list]

    def features(self, output: Any) -> Tensor:
        """Merged features of the last block, and behind each those of deepstack's blocks."""
        return torch.cat([output.pooler_output, *output.deepstack_features], dim=1)

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
