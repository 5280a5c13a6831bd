"""Qwen2.5-VL: a tower with windows, whose last layer's merged features stand at the image positions."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers import Qwen2_5_VLForConditionalGeneration
from transformers.models.qwen2_5_vl import modeling_qwen2_5_vl as modeling

from ilvr_ds.data.images import VisionLayout
from ilvr_ds.model.families.family import Family


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

    def layout(self, vision_config: Any) -> VisionLayout:
        """The sizes of the tower that the data side needs."""
        return VisionLayout(vision_config.patch_size, vision_config.spatial_merge_size, vision_config.window_size)

    def feature_width(self, vision_config: Any) -> int:
        """The merged feature."""
        return int(vision_config.out_hidden_size)

    def leave_out_tower(self, vision_config: Any) -> None:
        """The stock model cannot be built without a tower, but with one of no blocks."""
        vision_config.depth = 0

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
