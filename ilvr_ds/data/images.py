"""Images on their way to the vision tower: resizing, patches as bytes, attention bookkeeping.

Patches travel as uint8 (588 bytes each) and are normalised on the device: a quarter of the float32 bytes
through worker queues and PCIe, and half of what is left because both frames of a still image are equal.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil, smart_resize
from transformers.vision_utils import (
    get_vision_interpolation_indices_and_weights,
    get_vision_position_ids,
    get_vision_window_index,
)

from ilvr_ds.data.decode import DECODING, decode_image
from ilvr_ds.data.sample import SampleError
from ilvr_ds.errors import UserError, first_line

GREY = (128, 128, 128)
Grid = tuple[int, int]


@dataclass(frozen=True)
class VisionLayout:
    """Sizes of a vision tower: `patch_size` in pixels, `merge_size` in patches, attention's `window_size` in pixels,
    `position_grid`: side of the square of learnt positions. Both 0 where the tower has none."""

    patch_size: int
    merge_size: int
    window_size: int
    position_grid: int = 0

    @property
    def cell(self) -> int:
        """Side of a merged patch in pixels."""
        return self.patch_size * self.merge_size


class ImageEncoder:
    """Encoded image bytes to uint8 patches, by the stock Qwen2-VL image processor.

    `max_pixels` caps the size below the processor's own limit. `blank` paints every image grey. Raises UserError where
    there is no processor, its limits cannot be read, or its smallest image is larger than `max_pixels`.
    """

    def __init__(self, path: str, max_pixels: int, blank: bool = False) -> None:
        try:
            self.processor: Any = Qwen2VLImageProcessorPil.from_pretrained(path)
        except (OSError, ValueError) as error:
            raise UserError(f"model.path: no image processor at '{path}' ({first_line(error)})") from error
        if self.processor.temporal_patch_size != 2:
            raise UserError(f"model.path: '{path}' has temporal_patch_size {self.processor.temporal_patch_size}, not 2")
        self.cell = self.processor.patch_size * self.processor.merge_size
        self.min_pixels, longest = _pixel_limits(self.processor, path)
        self.max_pixels = min(max_pixels, longest)
        if self.min_pixels > self.max_pixels:
            raise UserError(
                f"data.max_image_pixels: at most {self.max_pixels} pixels, but the image processor at '{path}' makes "
                f"none smaller than {self.min_pixels}; allow so many, or lower its minimum (preprocessor_config.json)"
            )
        self.blank = blank

    @property
    def mean(self) -> list[float]:
        """Channel means in units of 0..1, [3]."""
        return list(self.processor.image_mean)

    @property
    def std(self) -> list[float]:
        """Channel standard deviations in units of 0..1, [3]."""
        return list(self.processor.image_std)

    def grid(self, data: bytes) -> Grid:
        """(height, width) in patches after resizing; decodes the image, so that a damaged one raises SampleError."""
        return self.grid_of_size(decode_image(data).size)

    @property
    def settings(self) -> dict[str, Any]:
        """Everything besides the tower that an image's features depend on."""
        return {
            "patch_size": self.processor.patch_size,
            "merge_size": self.processor.merge_size,
            "min_pixels": self.min_pixels,
            "max_pixels": self.max_pixels,
            "mean": self.mean,
            "std": self.std,
            "blank": self.blank,
            "decoding": DECODING,
        }

    def grid_of_size(self, size: tuple[int, int]) -> Grid:
        """(height, width) in patches of an image whose `size` is (width, height) in pixels."""
        try:
            height, width = smart_resize(size[1], size[0], self.cell, self.min_pixels, self.max_pixels)
        except ValueError as error:
            raise SampleError(f"image of {size[0]}x{size[1]} pixels: {error}; crop or pad it") from error
        return height // self.processor.patch_size, width // self.processor.patch_size

    def __call__(self, files: Sequence[bytes]) -> list[tuple[NDArray[np.uint8], Grid]]:
        """For each image: patches [h*w, 3*patch*patch] uint8 in the tower's order, and its grid (h, w) in patches."""
        if not files:
            return []
        images = [decode_image(data) for data in files]
        grids = [self.grid_of_size(image.size) for image in images]
        resized = [self._resize(image, grid) for image, grid in zip(images, grids, strict=True)]
        raw = self.processor.preprocess(
            resized, do_resize=False, do_rescale=False, do_normalize=False, return_tensors="np"
        )["pixel_values"]
        one_frame = raw.reshape(raw.shape[0], 3, 2, -1)[:, :, 0].reshape(raw.shape[0], -1).astype(np.uint8)
        ends = np.cumsum([height * width for height, width in grids])
        return list(zip(np.split(one_frame, ends[:-1]), grids, strict=True))

    def seen(self, data: bytes) -> Image.Image:
        """The image as the tower sees it: resized, grey where `blank` is set."""
        image = decode_image(data)
        return self._resize(image, self.grid_of_size(image.size))

    def _resize(self, image: Image.Image, grid: Grid) -> Image.Image:
        height, width = (side * self.processor.patch_size for side in grid)
        if self.blank:
            return Image.new("RGB", (width, height), GREY)
        return image if image.size == (width, height) else image.resize((width, height), Image.Resampling.BICUBIC)


def _pixel_limits(processor: Any, path: str) -> tuple[int, int]:
    """Smallest and largest size of an image in pixels, in either of transformers' two spellings."""
    size = processor.size
    for least, largest in (("shortest_edge", "longest_edge"), ("min_pixels", "max_pixels")):
        if size.get(least) is not None and size.get(largest) is not None:
            return int(size[least]), int(size[largest])
    raise UserError(
        f"model.path: the image processor at '{path}' has size {dict(size)}; expected min_pixels and max_pixels, or "
        "the same numbers as shortest_edge and longest_edge"
    )


@lru_cache(maxsize=4096)
def _bookkeeping(grid: Grid, layout: VisionLayout) -> dict[str, torch.Tensor]:
    """What the tower needs for one image of a grid, with indices from zero."""
    thw = torch.tensor([[1, *grid]])
    found = {
        "position_ids": get_vision_position_ids(thw, layout.merge_size),
        "cu_seqlens": _bounds([grid[0] * grid[1]]),
    }
    if layout.window_size:
        found["window_index"], found["cu_window_seqlens"] = get_vision_window_index(
            thw, layout.merge_size, layout.window_size, layout.patch_size
        )
    if layout.position_grid:
        indices, found["interp_weights"] = get_vision_interpolation_indices_and_weights(
            thw, layout.position_grid, "bilinear", align_corners=True, spatial_merge_size=layout.merge_size
        )
        found["interp_indices"] = indices.int()
    return found


def attention_bookkeeping(grids: list[Grid], layout: VisionLayout) -> dict[str, torch.Tensor]:
    """What the stock tower would compute image by image in its forward, for images laid end to end.

    position_ids [patches, 2] int64, cu_seqlens [images + 1] int32. For a tower with windows window_index [merged]
    int64 and cu_window_seqlens [attention windows + 1] int32; for one with learnt positions interp_indices and
    interp_weights [patches, 4]. Computed once per distinct grid and shifted.
    """
    parts = [_bookkeeping(grid, layout) for grid in grids]
    merged = [h * w // layout.merge_size**2 for h, w in grids]
    starts = np.cumsum([0, *merged[:-1]]).tolist()
    joined: dict[str, torch.Tensor] = {}
    for name in parts[0]:
        pieces = [part[name] for part in parts]
        if name.startswith("cu_"):
            joined[name] = _bounds(torch.cat([piece.diff() for piece in pieces]).tolist())
        elif name == "window_index":
            joined[name] = torch.cat([piece + start for piece, start in zip(pieces, starts, strict=True)])
        else:
            joined[name] = torch.cat(pieces)
    return joined


def _bounds(lengths: list[int]) -> torch.Tensor:
    """[n + 1] int32: where pieces of these lengths begin and end."""
    return torch.tensor(np.cumsum([0, *lengths]), dtype=torch.int32)
