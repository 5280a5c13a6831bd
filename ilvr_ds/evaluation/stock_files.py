"""The files beside the weights of an exported model, as stock transformers 4 and 5 both read them.

transformers 5 writes configurations that version 4 cannot read, and reads those of version 4: so Qwen's releases are
written, and so is this.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ilvr_ds.data.images import ImageEncoder
from ilvr_ds.data.tokens import SpecialTokens
from ilvr_ds.model.families import family_of

_SIDE_FILES = (
    "generation_config.json",
    "video_preprocessor_config.json",
    "chat_template.json",
    "processor_config.json",
)
_OLD_CLASSES = {"TokenizersBackend": "PreTrainedTokenizerFast"}
"""Tokenizer classes of transformers 5 by their names in version 4."""


def write_config(folder: Path, config: Any, special: SpecialTokens, latent_size: int, dtype: torch.dtype) -> None:
    """The base's configuration with what generation needs, under the names that the authors' code uses too."""
    family = family_of(config)
    config.architectures = [family.model.__name__]
    config.latent_size = latent_size
    config.latent_token_id = special.latent_pad
    config.latent_start_id = special.latent_start
    config.latent_end_id = special.latent_end
    config.save_pretrained(folder)
    content = family.released_config(_read(folder / "config.json"))
    content["torch_dtype"] = str(dtype).removeprefix("torch.")
    content.pop("dtype", None)  # the name since 4.56
    _write(folder / "config.json", content)


def write_tokenizer(folder: Path, tokenizer: Any) -> None:
    """The tokenizer; its further special tokens as a list under the old name, its chat template in both places."""
    tokenizer.save_pretrained(folder)
    content = _read(folder / "tokenizer_config.json")
    content["tokenizer_class"] = _OLD_CLASSES.get(content["tokenizer_class"], content["tokenizer_class"])
    content["additional_special_tokens"] = content.pop("extra_special_tokens", [])
    content["chat_template"] = tokenizer.chat_template
    for key in ("backend", "is_local", "local_files_only"):
        content.pop(key, None)
    _write(folder / "tokenizer_config.json", content)


def write_image_processor(folder: Path, images: ImageEncoder) -> None:
    """The image processor with the limits that `images` keeps, in every spelling that some version reads."""
    images.processor.save_pretrained(folder)
    content = _read(folder / "preprocessor_config.json")
    content["size"] = {"shortest_edge": images.min_pixels, "longest_edge": images.max_pixels}
    content |= {"min_pixels": images.min_pixels, "max_pixels": images.max_pixels}
    _write(folder / "preprocessor_config.json", content)


def copy_side_files(base: str, folder: Path) -> None:
    """What else the base has for generation and processing, where it was not written already."""
    from transformers.utils import cached_file

    find: Callable[..., str | None] = cached_file
    for name in _SIDE_FILES:
        found = find(
            base, name, _raise_exceptions_for_missing_entries=False, _raise_exceptions_for_connection_errors=False
        )
        if found and not (folder / name).exists():
            shutil.copyfile(found, folder / name)
    if (folder / "processor_config.json").is_file():
        content = _read(folder / "processor_config.json")
        content.pop("image_processor", None)  # of the base: it would outrank preprocessor_config.json
        _write(folder / "processor_config.json", content)


def _read(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(path.read_text())
    return content


def _write(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n")
