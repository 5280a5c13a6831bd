"""A tiny random model of a family with its tokenizer, built, not downloaded, as a folder that stock transformers loads.

The vision tower is random and meant to stay frozen. For that a merged patch's feature must be a signature of its own
pixels:

- The plain initialisation (normal, std 0.02) is kept: the blocks add a few per cent to the residual stream, so that
  attention mixes in hardly anything of other patches. There are as few blocks as show every kind that the family has.
- The mean of each patch filter is damped. Patches on white share one large component, the filters' answer to flat
  white, which would put the cosine of any two cells near 0.8. It is not removed: a blank patch would be zero, and the
  norm before the merger would blow up the traces of its neighbours.
- The last layer is whitened, on pictures of the task or else on random coloured blobs. Without that the cosine of two
  shapes of one colour is up to 0.97: nearly all of a feature is its colour. Whitened on blobs alone, the cells of
  shaded pictures are too much alike (0.92 to the nearest other one): a latent that is nearly right names another cell.
- On pictures of a task the merger is made nearly linear (its GELU sees small values) and the whitening is mild, so that
  what is added to a cell is added to its feature: a mark's own direction is then the same wherever it stands (cosine
  0.95 of a marked cell to the same cell and the mean mark; 0.47 without), and a student can learn to draw it.
- Token embeddings and features get one scale, RMS 1. They stand side by side in the sequence, and so does the last
  hidden state, RMS 1 after the final norm, that generation feeds back as a latent. What is added to hidden states
  (deepstack) has half of it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from ilvr_ds.file_modes import follow_umask
from ilvr_ds.model.families import Family, family_named

SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|object_ref_start|>",
    "<|object_ref_end|>",
    "<|box_start|>",
    "<|box_end|>",
    "<|quad_start|>",
    "<|quad_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
"""Special tokens in Qwen's order; they follow the vocabulary."""

_PRETOKENIZER = (  # Qwen2's: words with their leading space, digits one by one
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_TEMPLATE_WORDS = "system\nYou are a helpful assistant. user\n assistant\n"
_ROW_MULTIPLE = 64
_HEAD_ROOM = 3  # rows for the latent tokens, which the trainer adds
_FLAT_DAMPING = 0.2
_BLOBS_SIDE = 32
_FLOOR, _MILD_FLOOR = 1e-3, 0.1  # of the largest variance: what lies below counts as little
_LINEAR = 0.1  # GELU is linear within a few per cent where its inputs have been scaled by this
_ADDED_RMS = 0.5


@dataclass(frozen=True)
class TinySize:
    """Sizes of a tiny model.

    `vocab_size`: entries of the tokenizer before the special tokens, at most; at least 256, the bytes.
    """

    hidden_size: int
    intermediate_size: int
    layers: int
    heads: int
    kv_heads: int
    vision_hidden_size: int
    vision_heads: int
    vocab_size: int


TINY = TinySize(64, 128, 2, 4, 2, vision_hidden_size=32, vision_heads=2, vocab_size=512)
"""About 0.2 M parameters: for tests and the demo."""

MINI = TinySize(128, 384, 4, 4, 2, vision_hidden_size=64, vision_heads=2, vocab_size=512)
"""About 1 M parameters: the smallest that learns to follow a trail."""

MEDIUM = TinySize(384, 1024, 6, 6, 2, vision_hidden_size=128, vision_heads=4, vocab_size=512)
"""A language model of about 10 M parameters: to compare what latents are taught, several at a time on one GPU."""

SMALL = TinySize(640, 1920, 5, 10, 2, vision_hidden_size=128, vision_heads=4, vocab_size=1024)
"""A language model of about 25 M parameters: to learn the demo task on one GPU."""


def build_tiny_model(
    directory: Path,
    *,
    texts: Iterable[str],
    size: TinySize = TINY,
    seed: int = 0,
    family: str = "qwen2_5_vl",
    pictures: Sequence[Image.Image] = (),
) -> None:
    """Write config, weights (fp32), tokenizer and image processor of a random model into `directory`.

    texts: what the tokenizer's merges are learnt from. The latent tokens are not in it, but the embedding has rows
    for them. family: its `model_type`. pictures: RGB, to whiten the vision tower's features on; none: blobs. The same
    arguments give the same files. Raises UserError for an unknown family.
    """
    kind = family_named(family)
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer = _build_tokenizer(texts, size.vocab_size, kind.chat_template)
    tokenizer.save_pretrained(directory)
    images = Qwen2VLImageProcessorPil(**kind.image_settings)
    images.save_pretrained(directory)
    config = kind.tiny_config(_text(size, tokenizer), _vision(size), _image_tokens(tokenizer))
    seen = images(list(pictures), return_tensors="pt") if pictures else None
    _build_model(kind, config, images, seed, seen).save_pretrained(directory)
    follow_umask(directory / "model.safetensors")


def _build_tokenizer(texts: Iterable[str], vocab_size: int, chat_template: str) -> Any:
    """A byte-level BPE tokenizer as Qwen's, with merges learnt from `texts`."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_PRETOKENIZER), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(chain(texts, [_TEMPLATE_WORDS] * 100), trainer)
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        extra_special_tokens=list(SPECIAL_TOKENS),
        chat_template=chat_template,
    )


def _text(size: TinySize, tokenizer: Any) -> dict[str, Any]:
    rows = math.ceil((len(tokenizer) + _HEAD_ROOM) / _ROW_MULTIPLE) * _ROW_MULTIPLE
    return {
        "vocab_size": rows,
        "hidden_size": size.hidden_size,
        "intermediate_size": size.intermediate_size,
        "num_hidden_layers": size.layers,
        "num_attention_heads": size.heads,
        "num_key_value_heads": size.kv_heads,
        "max_position_embeddings": 32768,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
        "bos_token_id": None,
        "eos_token_id": tokenizer.convert_tokens_to_ids("<|im_end|>"),
        "pad_token_id": tokenizer.convert_tokens_to_ids("<|endoftext|>"),
    }


def _vision(size: TinySize) -> dict[str, Any]:
    return {
        "hidden_size": size.vision_hidden_size,
        "intermediate_size": 2 * size.vision_hidden_size,
        "num_heads": size.vision_heads,
        "out_hidden_size": size.hidden_size,
    }


def _image_tokens(tokenizer: Any) -> dict[str, int]:
    """Ids as the tokenizer gives them."""
    names = {
        "image_token_id": "<|image_pad|>",
        "video_token_id": "<|video_pad|>",
        "vision_start_token_id": "<|vision_start|>",
        "vision_end_token_id": "<|vision_end|>",
    }
    return {key: tokenizer.convert_tokens_to_ids(token) for key, token in names.items()}


def _build_model(family: Family, config: Any, images: Any, seed: int, seen: Any) -> Any:
    """Random weights (fp32) with the changes that this file's docstring explains."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        model = family.model(config).float()
        embedding = model.get_input_embeddings().weight
        embedding.div_(_rms(embedding))

        tower = model.model.visual
        filters = tower.patch_embed.proj.weight  # [hidden, channels, frames, height, width]
        filters.sub_((1 - _FLAT_DAMPING) * filters.mean(dim=(2, 3, 4), keepdim=True))
        if seen is None:
            _whiten(family, tower, *_blobs(tower.patch_size, *_tones(images)), _FLOOR)
        else:
            first, _ = family.merger_layers(tower)
            first.weight.mul_(_LINEAR)
            first.bias.mul_(_LINEAR)
            _whiten(family, tower, seen["pixel_values"], seen["image_grid_thw"], _MILD_FLOOR)
    return model


def _whiten(family: Family, tower: Any, pixels: torch.Tensor, grids: torch.Tensor, floor: float) -> None:
    """Compose the tower's last layer with the whitening of its features of these pictures, and scale them to RMS 1."""
    output = tower(pixels, grid_thw=grids)
    features = output.pooler_output
    mean = features.mean(0)
    values, vectors = torch.linalg.eigh((features - mean).T @ (features - mean) / len(features))
    whitening = vectors @ (values + floor * values[-1]).rsqrt().diag() @ vectors.T
    whitening /= _rms((features - mean) @ whitening)
    _, last = family.merger_layers(tower)
    last.weight.copy_(whitening @ last.weight)
    last.bias.copy_(whitening @ (last.bias - mean))
    added = torch.split(family.features(output), features.shape[1], dim=1)[1:]
    for layer, rows in zip(family.added_layers(tower), added, strict=True):
        layer.weight.mul_(_ADDED_RMS / _rms(rows))


def _tones(images: Any) -> tuple[list[float], float]:
    """What the image processor makes of white, and by how much black is lower, about."""
    white = [round((1 - mean) / std, 2) for mean, std in zip(images.image_mean, images.image_std, strict=True)]
    return white, round(1 / min(images.image_std), 1)


def _blobs(patch: int, white_tones: list[float], contrast: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Pixels [patches, 3 * 2 * patch * patch] of cells that hold a blob of one colour on white, every eighth nothing;
    and their grid.

    white_tones: what the image processor makes of white; black is lower by `contrast`.
    """
    count, cell = _BLOBS_SIDE**2, 2 * patch
    form = torch.nn.functional.interpolate(torch.randn(count, 1, 5, 5), (cell, cell), mode="bicubic") > 0
    distance = (torch.arange(cell) - (cell - 1) / 2).square()
    form &= distance[:, None] + distance < (patch - 2) ** 2
    form[::8] = False
    white = torch.tensor(white_tones)[:, None, None]
    colour = white - contrast * torch.rand(count, 3, 1, 1)
    cells = torch.where(form, colour, white)
    patches = cells.view(count, 3, 2, patch, 2, patch).permute(0, 2, 4, 1, 3, 5)
    pixels = patches[:, :, :, :, None].expand(-1, -1, -1, -1, 2, -1, -1).reshape(4 * count, -1)
    return pixels, torch.tensor([[1, 2 * _BLOBS_SIDE, 2 * _BLOBS_SIDE]])


def _rms(values: torch.Tensor) -> torch.Tensor:
    return values.pow(2).mean().sqrt()
