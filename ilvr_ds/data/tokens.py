"""The tokenizer with the three latent tokens, and the ids that the trainer speaks of."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from transformers import AutoTokenizer

from ilvr_ds.errors import UserError

LATENT_TOKENS = ("<|latent_pad|>", "<|latent_start|>", "<|latent_end|>")
_BASE_TOKENS = ("<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>")


@dataclass(frozen=True)
class SpecialTokens:
    """Ids of the special tokens, as the tokenizer gives them."""

    latent_pad: int
    latent_start: int
    latent_end: int
    im_start: int
    im_end: int
    vision_start: int
    vision_end: int
    image_pad: int
    pad: int

    @property
    def context_free(self) -> tuple[int, ...]:
        """Tokens that carry no text: left out of the teacher's context means."""
        return (self.latent_pad, self.latent_start, self.latent_end, self.vision_start, self.vision_end)


def has_latent_tokens(path: str) -> bool:
    """Whether the tokenizer at `path`, which `load_tokenizer` takes, has the latent tokens by itself."""
    return set(LATENT_TOKENS) <= set(AutoTokenizer.from_pretrained(path).get_vocab())


def load_tokenizer(path: str, add_latent_tokens: bool = True) -> tuple[Any, SpecialTokens]:
    """The tokenizer at `path` (folder or hub name) with the latent tokens, added in their fixed order where missing.

    Raises UserError where there is no tokenizer, no chat template, or Qwen2.5-VL's tokens are missing; without
    `add_latent_tokens` also where the latent tokens are.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError) as error:
        first_line = str(error).strip().splitlines()[0]
        raise UserError(f"model.path: no tokenizer at '{path}' ({first_line})") from error
    missing = [token for token in _BASE_TOKENS if token not in tokenizer.get_vocab()]
    if missing:
        raise UserError(
            f"model.path: the tokenizer at '{path}' lacks {', '.join(missing)}; it is not a Qwen2.5-VL tokenizer"
        )
    if tokenizer.chat_template is None:
        raise UserError(f"model.path: the tokenizer at '{path}' has no chat template")
    absent = [token for token in LATENT_TOKENS if token not in tokenizer.get_vocab()]
    if absent and not add_latent_tokens:
        raise UserError(
            f"model.path: the tokenizer at '{path}' lacks {', '.join(absent)}: the model was not trained with latents; "
            "take a model that `ilvr-ds export` wrote"
        )
    tokenizer.add_tokens(list(LATENT_TOKENS), special_tokens=True)
    names = [*LATENT_TOKENS, *_BASE_TOKENS]
    ids = dict(zip(names, tokenizer.convert_tokens_to_ids(names), strict=True))
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else ids["<|im_end|>"]
    return tokenizer, SpecialTokens(pad=pad, **{name.strip("<|>"): token for name, token in ids.items()})
