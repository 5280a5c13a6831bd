"""Qwen2.5-VL: a tower with windows, whose last layer's merged features stand at the image positions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from transformers import Qwen2_5_VLForConditionalGeneration
from transformers.models.qwen2_5_vl import modeling_qwen2_5_vl as modeling

from ilvr_ds.data.images import VisionLayout
from ilvr_ds.model.families.family import TURNS, Family, Release

_SYSTEM_TURN = """\
{%- if messages[0]['role'] != 'system' -%}
{{- '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' -}}
{%- endif -%}
"""


def _release(
    name: str, hidden: int, layers: int, heads: int, kv_heads: int, intermediate: int, tower: int, rows: int = 152064
) -> Release:
    """tower: width of the gated layers of its blocks. rows: of the embedding."""
    text = {
        "hidden_size": hidden, "num_hidden_layers": layers, "num_attention_heads": heads,
        "num_key_value_heads": kv_heads, "intermediate_size": intermediate, "vocab_size": rows,
        "max_window_layers": layers, "max_position_embeddings": 128_000,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]},
    }  # fmt: skip
    vision = {
        "depth": 32, "hidden_size": 1280, "intermediate_size": tower, "num_heads": 16, "out_hidden_size": hidden,
        "fullatt_block_indexes": [7, 15, 23, 31],
    }  # fmt: skip
    return Release(f"Qwen/Qwen2.5-VL-{name}-Instruct", text, vision, is_tied=name == "3B")


class Qwen25VL(Family):
    """3B to 72B."""

    name = "qwen2_5_vl"
    title = "Qwen2.5-VL"
    modeling = modeling
    model = Qwen2_5_VLForConditionalGeneration
    text_model = modeling.Qwen2_5_VLTextModel
    tower = modeling.Qwen2_5_VisionTransformerPretrainedModel
    norms = modeling.Qwen2_5_VLRMSNorm
    gated = (modeling.Qwen2MLP, modeling.Qwen2_5_VLMLP)
    rotate = staticmethod(modeling.apply_rotary_pos_emb)
    rotate_vision = staticmethod(modeling.apply_rotary_pos_emb_vision)
    tower_settings = (
        "depth", "hidden_size", "num_heads", "hidden_act", "window_size", "fullatt_block_indexes", "out_hidden_size",
    )  # fmt: skip
    loaded_by = "4.57 and 5"
    releases: Mapping[str, Release] = {
        "3b": _release("3B", 2048, 36, 16, 2, 11008, 3420, rows=151936),
        "7b": _release("7B", 3584, 28, 28, 4, 18944, 3420),
        "32b": _release("32B", 5120, 64, 40, 8, 27648, 3456),
        "72b": _release("72B", 8192, 80, 64, 8, 29568, 3456),
    }
    chat_template = f"{_SYSTEM_TURN}{TURNS}"
    image_settings: Mapping[str, Any] = {}

    def layout(self, vision_config: Any) -> VisionLayout:
        """The sizes of the tower that the data side needs."""
        return VisionLayout(vision_config.patch_size, vision_config.spatial_merge_size, vision_config.window_size)

    def feature_width(self, vision_config: Any) -> int:
        """The merged feature."""
        return int(vision_config.out_hidden_size)

    def leave_out_tower(self, vision_config: Any) -> None:
        """The stock model cannot be built without a tower, but with one of no blocks."""
        vision_config.depth = 0

    def tower_sizes(self, vision_config: Any) -> dict[str, Any]:
        """Blocks attend within windows, but for a few."""
        return {"full_attention_blocks": len(vision_config.fullatt_block_indexes)}

    def tiny_config(self, text: dict[str, Any], vision: dict[str, Any], tokens: dict[str, int]) -> Any:
        """A tower of two blocks, one windowed and one full."""
        pairs = text["hidden_size"] // text["num_attention_heads"] // 2  # of a head, cut as the releases do
        sections = [pairs // 4, pairs * 3 // 8, pairs * 3 // 8]
        return self.model.config_class(
            text_config={**text, "rope_parameters": {**text["rope_parameters"], "mrope_section": sections}},
            vision_config={**vision, "depth": 2, "fullatt_block_indexes": [1]},
            **tokens,
        )

    def merger_layers(self, tower: Any) -> tuple[Any, Any]:
        """A GELU lies between them."""
        return tower.merger.mlp[0], tower.merger.mlp[-1]

    def mask_argument(self, mask: Tensor | None) -> Any:
        """By kind of layer; all have full attention."""
        return {"full_attention": mask}

    def added_arguments(self, language_model: Any, slots: Tensor, added: tuple[Tensor, ...]) -> dict[str, Any]:
        """None: features stand among the embeddings and nowhere else."""
        return {}

    def queries(self, attention: Any, hidden: Tensor) -> Tensor:
        """[..., D] -> [..., heads, d]."""
        queries: Tensor = attention.q_proj(hidden).unflatten(-1, (-1, attention.head_dim))
        return queries

    def keys(self, attention: Any, hidden: Tensor) -> Tensor:
        """[..., D] -> [..., key-value heads, d]."""
        keys: Tensor = attention.k_proj(hidden).unflatten(-1, (-1, attention.head_dim))
        return keys

    def hub_name(self, name: str) -> str:
        """As it is: transformers 4 and 5 map these names to their own."""
        return name

    def released_config(self, content: dict[str, Any]) -> dict[str, Any]:
        """The text model's settings stand at the top level and its rotation in `rope_theta` and `rope_scaling`."""
        text = content.pop("text_config")
        rope = text.pop("rope_parameters")
        kind = rope.pop("rope_type")
        rope.pop("type", None)
        text["rope_theta"] = rope.pop("rope_theta")
        text["rope_scaling"] = {"type": "mrope" if kind == "default" else kind, **rope}
        return {**text, **content}
