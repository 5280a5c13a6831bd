"""A tiny random Qwen2.5-VL with its tokenizer, built instead of downloaded, as a folder that stock transformers loads.

The vision tower is random and meant to stay frozen. For that a merged patch's feature must be a signature of its own
28x28 pixels:

- The plain initialisation (normal, std 0.02) is kept: the blocks add a few per cent to the residual stream, so that
  attention mixes in hardly anything of other patches. Depth 2, one windowed and one full block, runs both kinds of
  attention.
- The mean of each patch filter is damped. Patches on white share one large component, the filters' answer to flat
  white, which would put the cosine of any two cells near 0.8. It is not removed: a blank patch would be zero, and the
  norm before the merger would blow up the traces of its neighbours.
- The last layer is whitened, on pictures of the task or else on random coloured blobs. Without that the cosine of two
  shapes of one colour is up to 0.97: nearly all of a feature is its colour. Whitened on blobs alone, the cells of
  shaded pictures are too much alike (0.92 to the nearest other one): a latent that is nearly right names another cell.
- Token embeddings and features get one scale, RMS 1. They stand side by side in the sequence, and so does the last
  hidden state, RMS 1 after the final norm, that generation feeds back as a latent.
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
from transformers import PreTrainedTokenizerFast, Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from ilvr_ds.file_modes import follow_umask

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
"""Qwen2.5-VL's special tokens in Qwen's order; they follow the vocabulary."""

CHAT_TEMPLATE = """\
{%- if messages[0]['role'] != 'system' -%}
{{- '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' -}}
{%- endif -%}
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
"""Gives the same text as Qwen2.5-VL's template for text and images."""

_PRETOKENIZER = (  # Qwen2's: words with their leading space, digits one by one
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_TEMPLATE_WORDS = "system\nYou are a helpful assistant. user\n assistant\n"
_ROW_MULTIPLE = 64
_HEAD_ROOM = 3  # rows for the latent tokens, which the trainer adds
_FLAT_DAMPING = 0.2
_BLOBS_SIDE = 32
_FLOOR = 1e-3  # of the largest variance: directions below it are noise


@dataclass(frozen=True)
class TinySize:
    """Sizes of a tiny model; the vision tower has 2 blocks, the second with full attention.

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
    pictures: Sequence[Image.Image] = (),
) -> None:
    """Write config, weights (fp32), tokenizer and image processor of a random Qwen2.5-VL into `directory`.

    texts: what the tokenizer's merges are learnt from. The latent tokens are not in it, but the embedding has rows
    for them. pictures: RGB, of sides that are multiples of 28, to whiten the vision tower's features on; none: blobs.
    The same arguments give the same files.
    """
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer = _build_tokenizer(texts, size.vocab_size)
    tokenizer.save_pretrained(directory)
    Qwen2VLImageProcessorPil().save_pretrained(directory)
    _build_model(_build_config(size, tokenizer), seed, pictures).save_pretrained(directory)
    follow_umask(directory / "model.safetensors")


def _build_tokenizer(texts: Iterable[str], vocab_size: int) -> Any:
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
        chat_template=CHAT_TEMPLATE,
    )


def _build_config(size: TinySize, tokenizer: Any) -> Any:
    """The model's configuration; ids of special tokens as the tokenizer gives them."""
    ids = dict(zip(SPECIAL_TOKENS, tokenizer.convert_tokens_to_ids(list(SPECIAL_TOKENS)), strict=True))
    rows = math.ceil((len(tokenizer) + _HEAD_ROOM) / _ROW_MULTIPLE) * _ROW_MULTIPLE
    rotary = size.hidden_size // size.heads // 2  # pairs of a head, cut among time, height and width as Qwen does
    text = {
        "vocab_size": rows,
        "hidden_size": size.hidden_size,
        "intermediate_size": size.intermediate_size,
        "num_hidden_layers": size.layers,
        "num_attention_heads": size.heads,
        "num_key_value_heads": size.kv_heads,
        "max_position_embeddings": 32768,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 1e6,
            "mrope_section": [rotary // 4, rotary * 3 // 8, rotary * 3 // 8],
        },
        "bos_token_id": None,
        "eos_token_id": ids["<|im_end|>"],
        "pad_token_id": ids["<|endoftext|>"],
    }
    vision = {
        "depth": 2,
        "hidden_size": size.vision_hidden_size,
        "intermediate_size": 2 * size.vision_hidden_size,
        "num_heads": size.vision_heads,
        "out_hidden_size": size.hidden_size,
        "fullatt_block_indexes": [1],
    }
    return Qwen2_5_VLConfig(
        text_config=text,
        vision_config=vision,
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
    )


def _build_model(config: Any, seed: int, pictures: Sequence[Image.Image]) -> Any:
    """Random weights (fp32) with the changes that this file's docstring explains."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        model = Qwen2_5_VLForConditionalGeneration(config).float()
        embedding = model.get_input_embeddings().weight
        embedding.div_(_rms(embedding))

        tower = model.model.visual
        filters = tower.patch_embed.proj.weight  # [hidden, channels, frames, height, width]
        filters.sub_((1 - _FLAT_DAMPING) * filters.mean(dim=(2, 3, 4), keepdim=True))
        _whiten(tower, *(_pixels(pictures) if pictures else _blobs()))
    return model


def _whiten(tower: Any, pixels: torch.Tensor, grids: torch.Tensor) -> None:
    """Compose the tower's last layer with the whitening of its features of these pictures, and scale them to RMS 1."""
    features = tower(pixels, grid_thw=grids).pooler_output
    mean = features.mean(0)
    values, vectors = torch.linalg.eigh((features - mean).T @ (features - mean) / len(features))
    whitening = vectors @ (values + _FLOOR * values[-1]).rsqrt().diag() @ vectors.T
    whitening /= _rms((features - mean) @ whitening)
    last = tower.merger.mlp[-1]
    last.weight.copy_(whitening @ last.weight)
    last.bias.copy_(whitening @ (last.bias - mean))


def _pixels(pictures: Sequence[Image.Image]) -> tuple[torch.Tensor, torch.Tensor]:
    """Pixels and grids of pictures in their own size."""
    sides = [side for picture in pictures for side in picture.size]
    limits = {"min_pixels": min(sides) ** 2, "max_pixels": max(sides) ** 2}
    made = Qwen2VLImageProcessorPil(**limits)(list(pictures), return_tensors="pt")
    return made["pixel_values"], made["image_grid_thw"]


def _blobs() -> tuple[torch.Tensor, torch.Tensor]:
    """Pixels [patches, 3 * 2 * 14 * 14] of cells that hold a blob of one colour on white, every eighth nothing; and
    their grid."""
    count = _BLOBS_SIDE**2
    form = torch.nn.functional.interpolate(torch.randn(count, 1, 5, 5), (28, 28), mode="bicubic") > 0
    distance = (torch.arange(28) - 13.5).square()
    form &= distance[:, None] + distance < 12**2
    form[::8] = False
    white = torch.tensor([1.93, 2.07, 2.15])[:, None, None]  # as the image processor normalises it; black is 3.8 lower
    colour = white - 3.8 * torch.rand(count, 3, 1, 1)
    cells = torch.where(form, colour, white)
    patches = cells.view(count, 3, 2, 14, 2, 14).permute(0, 2, 4, 1, 3, 5)
    pixels = patches[:, :, :, :, None].expand(-1, -1, -1, -1, 2, -1, -1).reshape(4 * count, -1)
    return pixels, torch.tensor([[1, 2 * _BLOBS_SIDE, 2 * _BLOBS_SIDE]])


def _rms(values: torch.Tensor) -> torch.Tensor:
    return values.pow(2).mean().sqrt()
