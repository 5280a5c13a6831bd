"""A trained model folder, ready to answer: stock weights, tokenizer with latent tokens, image processor.

Reads what `ilvr-ds export` writes and what the authors released: `.bin` or safetensors shards, an embedding of exactly
the tokenizer's size, and the key names of transformers before 4.52, which stock transformers maps by itself.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from safetensors import SafetensorError
from torch import Tensor

from ilvr_ds import dist
from ilvr_ds.config import LIMITS
from ilvr_ds.data.collate import Collator
from ilvr_ds.data.images import ImageEncoder
from ilvr_ds.data.template import EncodedSample, SampleEncoder
from ilvr_ds.data.tokens import SpecialTokens, load_tokenizer
from ilvr_ds.data.window import Window
from ilvr_ds.errors import UserError, first_line
from ilvr_ds.generation.decoder import Decoder
from ilvr_ds.model.base_weights import check_weights
from ilvr_ds.model.families import Family, family_of
from ilvr_ds.model.layers.attention import attention_backend, use_varlen_attention
from ilvr_ds.model.layers.fused import use_fused_kernels
from ilvr_ds.model.student import DTYPES, detach_tower, load_config, vision_layout
from ilvr_ds.model.vision import VisionTower

MAX_PROMPT_TOKENS = 32768


@dataclass(frozen=True)
class Reasoner:
    """A model that answers, and what turns samples into its inputs."""

    model: Any
    """The stock model; its tower stands apart."""
    tower: VisionTower
    encoder: SampleEncoder
    latent_size: int
    """0 where the model has no latent tokens."""
    stop_ids: tuple[int, ...]
    """Tokens that end an answer."""
    device: torch.device
    decoder: Decoder | None = None
    """What decodes at the limit of memory; None: the plain loop does, on a CPU and where weights move"""

    @property
    def special(self) -> SpecialTokens:
        """Ids of the special tokens."""
        return self.encoder.special

    @property
    def pad_embedding(self) -> Tensor:
        """[D]: what stands at a latent slot that nothing is fed to."""
        weight: Tensor = self.model.get_input_embeddings().weight
        return weight[self.special.latent_pad].detach()

    def collate(self, prompts: list[EncodedSample], padded: Literal["left", "right"] = "left") -> Window:
        """The prompts as one micro-batch, padded on that side, on the device."""
        layout = vision_layout(self.model.config)
        collator = Collator(self.special, layout, max(1, self.latent_size), 1, padded)
        return collator(prompts, np.arange(len(prompts)), [len(prompts)]).to(self.device)

    def now(self) -> float:
        """Seconds on a clock, once the device has done what was asked of it."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()


def load_reasoner(
    path: str,
    device: torch.device,
    precision: str = "auto",
    latent_size: int | None = None,
    max_image_pixels: int | None = None,
    without_latents: bool = False,
) -> Reasoner:
    """Load the model at `path` (folder or hub name).

    precision "auto": bf16 on a GPU, fp32 elsewhere. latent_size None: what the model's configuration says.
    max_image_pixels None: the limit of the model's own image processor, which export sets to the run's.
    without_latents: a model that has no latent tokens, such as the base before training, will do; it opens no segment.
    Raises UserError where the folder is no model, lacks latent tokens or weights, or does not know its latent size.
    """
    if latent_size is not None and latent_size < 1:
        raise UserError(f"--latent-size {latent_size}: must be 1 or more")
    if (Path(path) / "checkpoints").is_dir():
        raise UserError(f"--model: '{path}' is a run; make a model of it: ilvr-ds export {path} --to DIR")
    name = ("bf16" if device.type == "cuda" else "fp32") if precision == "auto" else precision
    dtype = DTYPES[name]
    with speaking_of_the_option():
        config = load_config(path)
        tokenizer, special = load_tokenizer(path, add_latent_tokens=False, without_latents=without_latents)
        images = ImageEncoder(path, max_image_pixels or int(LIMITS["data.max_image_pixels"][1]))
    size = _latent_size(path, latent_size, config, special)
    if (adapters := Path(path) / "adapter" / "adapter_config.json").is_file():
        dist.warn("%s answers without the adapters in %s; export with --adapters merge", path, adapters.parent)
    model = _load_weights(path, family_of(config), dtype, attention_backend("auto", dtype))
    rows = model.get_input_embeddings().weight.shape[0]
    if len(tokenizer) > rows:
        raise UserError(f"--model: '{path}' has {rows} embedding rows for {len(tokenizer)} tokens; export it again")
    tower = detach_tower(model, lambda parameters: nullcontext())
    use_varlen_attention(tower, device, dtype)
    model = model.to(device).eval()
    use_fused_kernels(model.model.language_model, "auto", device, dtype)
    use_fused_kernels(tower, "auto", device, dtype)
    reasoner = Reasoner(
        model=model,
        tower=VisionTower(tower, images.mean, images.std).to(device),
        encoder=SampleEncoder(tokenizer, special, images, size, MAX_PROMPT_TOKENS),
        latent_size=size,
        stop_ids=_stop_ids(model, tokenizer, special),
        device=device,
    )
    return replace(reasoner, decoder=Decoder(reasoner)) if device.type == "cuda" else reasoner


def _latent_size(path: str, wanted: int | None, config: Any, special: SpecialTokens) -> int:
    """Latent steps of a segment; 0 where there are no latent tokens."""
    if not special.has_latents:
        if wanted is not None:
            raise UserError(f"--latent-size: the model at '{path}' has no latent tokens; leave it out")
        return 0
    size = wanted if wanted is not None else getattr(config, "latent_size", None)
    if not isinstance(size, int) or size < 1:
        raise UserError(f"--model: the configuration at '{path}' holds no latent_size; give --latent-size")
    return size


def _load_weights(path: str, family: Family, dtype: torch.dtype, attention: str) -> Any:
    with speaking_of_the_option():
        check_weights(path)
    try:
        model, info = family.model.from_pretrained(
            path, dtype=dtype, attn_implementation=attention, output_loading_info=True
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise UserError(f"--model: cannot load '{path}' ({first_line(error)})") from error
    for kind in ("missing_keys", "unexpected_keys"):
        if names := sorted(info[kind]):
            what = kind.partition("_")[0]
            raise UserError(f"--model: the weights at '{path}' do not fit: {len(names)} {what}, the first {names[0]}")
    return model


def _stop_ids(model: Any, tokenizer: Any, special: SpecialTokens) -> tuple[int, ...]:
    """The end of a turn, the end of a text, and what the model's generation settings name besides."""
    named = model.generation_config.eos_token_id
    ids = {special.im_end, *(named if isinstance(named, list) else [named])}
    ids.add(tokenizer.get_vocab().get("<|endoftext|>"))
    return tuple(sorted(token for token in ids if token is not None))


@contextmanager
def speaking_of_the_option() -> Iterator[None]:
    """Mistakes of a recipe's `model.path` and `data.max_image_pixels` are here mistakes of options."""
    try:
        yield
    except UserError as error:
        text = str(error).replace("model.path", "--model").replace("data.max_image_pixels", "--max-image-pixels")
        raise UserError(text) from error
