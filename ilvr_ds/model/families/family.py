"""What the rest of the package asks about a family of models. Everything that differs between families is here.

What they share is taken for granted: a tower and a decoder as transformers builds them (`model.visual`,
`model.language_model` with `embed_tokens`, `layers`, `norm` and `rotary_emb`, `lm_head`), Qwen's chat tokens and image
processor, mRoPE positions of images, and linear layers named as LoRA names them. The tower's arguments are named in
`ImageBatch`, its sizes in planning/geometry.py.

Letters: R rows of T tokens, N image tokens, D hidden size.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from types import ModuleType
from typing import Any

from torch import Tensor, nn

from ilvr_ds.data.images import VisionLayout


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
