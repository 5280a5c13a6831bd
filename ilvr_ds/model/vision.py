"""Where a window's vision features come from: the frozen tower, or what it wrote once (`ilvr-ds encode`)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from ilvr_ds.data.window import ImageBatch, Window
from ilvr_ds.model.families import family_of
from ilvr_ds.model.layers.attention import attention_in_words


class VisionTower(nn.Module):
    """A stock tower behind the normalisation of its image processor.

    mean, std: [3] in units of 0..1. All weights are frozen.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, tower: nn.Module, mean: list[float], std: list[float]) -> None:
        super().__init__()
        self.tower = tower
        self.is_flash = "flash" in cast(Any, tower).config._attn_implementation
        self.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, 3, 1, 1), persistent=False)

    @property
    def attention(self) -> str:
        """The tower's attention, for logs."""
        return attention_in_words(self.tower)

    def features(self, window: Window) -> Tensor:
        """Features [F, D or more] of a window's images."""
        return torch.cat([self(images) for images in window.images])

    @torch.no_grad()
    def forward(self, images: ImageBatch) -> Tensor:
        """[merged patches, D] in the tower's dtype, image after image, without a host sync: merged features, and behind
        each what the family adds to hidden states, one D after the other."""
        pixels = images.patches.view(len(images.patches), 3, 1, -1).float() / 255
        pixels = ((pixels - self.mean) / self.std).expand(-1, -1, 2, -1).flatten(1)
        output = self.tower(pixels, grid_thw=None, **self._bookkeeping(images))
        return family_of(cast(Any, self.tower).config).features(output)

    def _bookkeeping(self, images: ImageBatch) -> dict[str, Any]:
        lengths = images.named("cu_seqlens", "cu_window_seqlens")
        known: dict[str, Any] = images.named("position_ids", "window_index", "interp_indices", "interp_weights")
        if not self.is_flash:
            return known | lengths  # SDPA goes through the windows in Python and wants them on the host
        device = images.patches.device
        longest = {"cu_seqlens": "max_seqlen", "cu_window_seqlens": "max_window_seqlen"}
        known |= {longest[name]: int(bounds.diff().max()) for name, bounds in lengths.items()}
        return known | {name: tensor.to(device, non_blocking=True) for name, tensor in lengths.items()}


@dataclass(frozen=True)
class StoredFeatures:
    """Features that the loader has read with the samples; takes the tower's place."""

    dtype: torch.dtype
    """The networks' precision."""

    def features(self, window: Window) -> Tensor:
        """Features [F, D or more] of a window's images."""
        assert window.features is not None
        return window.features.to(self.dtype)
