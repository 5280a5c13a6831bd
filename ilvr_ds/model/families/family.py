"""What the rest of the package asks about a family of models. Everything that differs between families is here.

What they share is taken for granted: a tower and a decoder as transformers builds them (`model.visual`,
`model.language_model` with `embed_tokens`, `layers`, `norm` and `rotary_emb`, `lm_head`), Qwen's chat tokens and image
processor, mRoPE positions of images, and linear layers named as LoRA names them. The tower's arguments are named in
`ImageBatch`.

Letters: R rows of T tokens, N image tokens, D hidden size.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from torch import Tensor, nn

from ilvr_ds.data.images import VisionLayout
from ilvr_ds.model.sizes import Geometry, TextSizes, VisionSizes

TURNS = """\
{%- for message in messages -%}
{{- '<|im_start|>' + message['role'] + '\\n' -}}
{%- if message['content'] is string -%}
{{- message['content'] -}}
{%- else -%}
{%- for part in message['content'] -%}
{%- if part['type'] == 'image' -%}
{{- '<|vision_start|><|image_pad|><|vision_end|>' -}}
{%- elif part['type'] == 'text' -%}
{{- part['text'] -}}
{%- endif -%}
{%- endfor -%}
{%- endif -%}
{{- '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '<|im_start|>assistant\\n' -}}
{%- endif -%}"""
"""A chat template of Qwen's turns, of text and images."""


@dataclass(frozen=True)
class Release:
    """A released model: what of its configuration decides memory and time."""

    hub_name: str
    text: dict[str, Any]
    vision: dict[str, Any]
    is_tied: bool = False
    """The head is the embedding."""


class Family(ABC):
    """One family."""

    name: str
    """`model_type` of its configuration"""
    title: str
    """As people call it"""
    modeling: ModuleType
    """transformers' module"""
    model: Any
    """transformers' class of the whole model, of its language model and of its tower"""
    text_model: Any
    tower: type[nn.Module]
    norms: type[nn.Module]
    """RMS norms, which PyTorch's fused kernel can replace"""
    gated: tuple[type[nn.Module], ...]
    """Gated layers, which Liger's kernel can replace"""
    rotate: Any
    """transformers' rotations of the language model and of the tower, before any is replaced"""
    rotate_vision: Any
    tower_settings: tuple[str, ...]
    """What of the tower's configuration its features depend on, and neither weights nor image settings say"""
    loaded_by: str
    """Versions of transformers that load an exported model"""
    adds_features: bool = False
    """Whether features are also added to hidden states at the image positions"""
    has_head_norms: bool = False
    """Whether queries and keys have norms, and no biases"""
    releases: Mapping[str, Release]
    """By the name that `ilvr-ds plan --model` takes"""
    chat_template: str
    """Gives the same text as the releases' for text and images; of tiny models"""
    image_settings: Mapping[str, Any]
    """Of the image processor where they differ from its defaults; of tiny models"""

    def config_of(self, release: Release) -> Any:
        """The configuration of a released model, without the ids of its tokens."""
        return self.model.config_class(
            text_config=dict(release.text), vision_config=dict(release.vision), tie_word_embeddings=release.is_tied
        )

    def geometry(self, config: Any) -> Geometry:
        """The sizes in a configuration."""
        text, vision = config.text_config, config.vision_config
        heads = text.num_attention_heads
        return Geometry(
            TextSizes(
                hidden_size=text.hidden_size,
                layers=text.num_hidden_layers,
                heads=heads,
                kv_heads=text.num_key_value_heads,
                head_dim=getattr(text, "head_dim", None) or text.hidden_size // heads,
                intermediate_size=text.intermediate_size,
                vocab_size=text.vocab_size,
                is_tied=bool(config.tie_word_embeddings),
                has_head_norms=self.has_head_norms,
            ),
            VisionSizes(
                hidden_size=vision.hidden_size,
                depth=vision.depth,
                heads=vision.num_heads,
                intermediate_size=vision.intermediate_size,
                out_hidden_size=vision.out_hidden_size,
                patch_size=vision.patch_size,
                temporal_patch_size=vision.temporal_patch_size,
                merge_size=vision.spatial_merge_size,
                **self.tower_sizes(vision),
            ),
        )

    @abstractmethod
    def tower_sizes(self, vision_config: Any) -> dict[str, Any]:
        """What of `VisionSizes` the families' configurations say differently."""

    @abstractmethod
    def tiny_config(self, text: dict[str, Any], vision: dict[str, Any], tokens: dict[str, int]) -> Any:
        """A configuration of the sizes `text` and `vision` with every part that the family has.

        tokens: ids of image tokens. The head size, mRoPE's sections, blocks and what belongs to them are chosen here.
        """

    @abstractmethod
    def merger_layers(self, tower: Any) -> tuple[Any, Any]:
        """The two linear layers that give the merged features."""

    def added_layers(self, tower: Any) -> list[Any]:
        """The last linear layer of each merger whose features are added to hidden states."""
        return []

    def features(self, output: Any) -> Tensor:
        """Rows of features [merged patches, D or more] in a tower's output."""
        merged: Tensor = output.pooler_output
        return merged

    @abstractmethod
    def layout(self, vision_config: Any) -> VisionLayout:
        """The sizes of the tower that the data side needs."""

    @abstractmethod
    def feature_width(self, vision_config: Any) -> int:
        """Numbers in a row of the tower's features: D, and D for each layer behind which they are added."""

    @abstractmethod
    def leave_out_tower(self, vision_config: Any) -> None:
        """Change a configuration so that the stock model is built with as little of a tower as it can be."""

    @abstractmethod
    def mask_argument(self, mask: Tensor | None) -> Any:
        """A ready-made mask as the language model takes it."""

    @abstractmethod
    def added_arguments(self, language_model: Any, slots: Tensor, added: tuple[Tensor, ...]) -> dict[str, Any]:
        """By which the language model adds `added` [N, D], one behind each of its first layers, at the flat positions
        `slots` [N]."""

    @staticmethod
    def add_rows(hidden: Tensor, slots: Tensor, rows: Tensor) -> Tensor:
        """hidden [R, T, D] with `rows` [N, D] added at the flat positions `slots` [N]; not in place."""
        return hidden.flatten(0, 1).index_add(0, slots, rows.to(hidden.dtype)).view_as(hidden)

    @abstractmethod
    def queries(self, attention: Any, hidden: Tensor) -> Tensor:
        """What an attention layer makes queries of, before rotation: [..., D] -> [..., heads, d]."""

    @abstractmethod
    def keys(self, attention: Any, hidden: Tensor) -> Tensor:
        """The same for keys: [..., D] -> [..., key-value heads, d]."""

    @abstractmethod
    def hub_name(self, name: str) -> str:
        """The name in a released model of the weight `visual.*`, `model.*` (language model) or `lm_head.*`."""

    @abstractmethod
    def released_config(self, content: dict[str, Any]) -> dict[str, Any]:
        """A config.json that transformers 5 wrote, as released models have it."""
