"""The tokenizer with the three latent tokens, and the ids of all special tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from jinja2 import TemplateError
from transformers import AutoTokenizer

from ilvr_ds.errors import UserError, first_line

LATENT_TOKENS = ("<|latent_pad|>", "<|latent_start|>", "<|latent_end|>")
ABSENT = -1
"""The id of a latent token that a tokenizer lacks: no token has it."""
_QUESTION, _THOUGHT, _ANSWER = "How many?", "I count them.", "As many as there are."
THOUGHT_TOKENS = ("<think>", "</think>")
"""What a thought stands between"""
_BASE_TOKENS = ("<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>")


@dataclass(frozen=True)
class SpecialTokens:
    """Ids of the special tokens, asked of the tokenizer."""

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
    def has_latents(self) -> bool:
        """Whether the latent tokens are there at all."""
        return self.latent_start != ABSENT

    @property
    def context_free(self) -> tuple[int, ...]:
        """Tokens that carry no text and are left out of the teacher's context means."""
        return (self.latent_pad, self.latent_start, self.latent_end, self.vision_start, self.vision_end)


def has_latent_tokens(path: str) -> bool:
    """Whether the tokenizer at `path` has the latent tokens before `load_tokenizer` adds them."""
    return set(LATENT_TOKENS) <= set(AutoTokenizer.from_pretrained(path).get_vocab())


def load_tokenizer(
    path: str, add_latent_tokens: bool = True, without_latents: bool = False
) -> tuple[Any, SpecialTokens]:
    """The tokenizer at `path` (folder or hub name) with the latent tokens, added in their fixed order where missing.

    Raises UserError where there is no tokenizer, no chat template that can say text and images, or Qwen's tokens for
    images and turns are missing; without `add_latent_tokens` also where the latent tokens are. without_latents: a
    tokenizer that has none of them stays as it is, and their ids are ABSENT.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError) as error:
        raise UserError(f"model.path: no tokenizer at '{path}' ({first_line(error)})") from error
    _list_special_tokens(tokenizer)
    missing = [token for token in _BASE_TOKENS if token not in tokenizer.get_vocab()]
    if missing:
        raise UserError(
            f"model.path: the tokenizer at '{path}' lacks {', '.join(missing)}; it is not a tokenizer of Qwen2.5-VL or "
            "Qwen3-VL"
        )
    if tokenizer.chat_template is None:
        raise UserError(f"model.path: the tokenizer at '{path}' has no chat template")
    for images in (0, 1):
        if fault := _template_fault(tokenizer, images):
            raise UserError(
                f"model.path: the chat template at '{path}' cannot say {'an image' if images else 'a text'} ({fault}); "
                "take tokenizer_config.json of the model's release"
            )
    if not (_goes_on(tokenizer, _ANSWER) or opens_thought(tokenizer)):
        raise UserError(
            f"model.path: the chat template at '{path}' ends a prompt otherwise than an answer begins, with and "
            "without reasoning_content; take chat_template.json of the model's release"
        )
    absent = [token for token in LATENT_TOKENS if token not in tokenizer.get_vocab()]
    has_none = without_latents and len(absent) == len(LATENT_TOKENS)
    if absent and not add_latent_tokens and not has_none:
        raise UserError(
            f"model.path: the tokenizer at '{path}' lacks {', '.join(absent)}: the model was not trained with latents; "
            "take a model that `ilvr-ds export` wrote"
        )
    if not has_none:
        tokenizer.add_tokens(list(LATENT_TOKENS), special_tokens=True)
    names = [*_BASE_TOKENS] if has_none else [*LATENT_TOKENS, *_BASE_TOKENS]
    ids = dict.fromkeys(LATENT_TOKENS, ABSENT) | dict(zip(names, tokenizer.convert_tokens_to_ids(names), strict=True))
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else ids["<|im_end|>"]
    return tokenizer, SpecialTokens(pad=pad, **{name.strip("<|>"): token for name, token in ids.items()})


def _list_special_tokens(tokenizer: Any) -> None:
    """Name among its special tokens all that a tokenizer marks as special: no text may hold them.

    transformers 5.17 overlooks the list that version 4 wrote, and every version what was added later.
    """
    listed = {*tokenizer.all_special_tokens, *LATENT_TOKENS}
    marked = [str(token) for token in tokenizer.added_tokens_decoder.values() if token.special]
    if unlisted := [token for token in marked if token not in listed]:
        tokenizer.add_special_tokens({"extra_special_tokens": unlisted}, replace_extra_special_tokens=False)


def opens_thought(tokenizer: Any) -> bool:
    """Whether a prompt ends inside a thought, as those of Thinking releases do: an answer must begin with one."""
    return not _goes_on(tokenizer, _ANSWER) and _goes_on(tokenizer, _THOUGHT, reasoning_content=_THOUGHT)


def _goes_on(tokenizer: Any, words: str, **thought: str) -> bool:
    """Whether a prompt is how its answer begins in training and `words` follow: a model is asked what it has learnt."""
    turns = [{"role": "user", "content": [{"type": "text", "text": _QUESTION}]}]
    answered = [*turns, {"role": "assistant", "content": _ANSWER, **thought}]
    prompt = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    whole = tokenizer.apply_chat_template(answered, tokenize=False)
    asked, read = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in (prompt, whole))
    return bool(whole.startswith(prompt + words) and read[: len(asked)] == asked)


def _template_fault(tokenizer: Any, images: int) -> str | None:
    """What the chat template does wrong with a question of this many images and its answer; None if nothing.

    Templates for text alone take a list of parts for a text, or print it as Python does.
    """
    content = [*([{"type": "image"}] * images), {"type": "text", "text": _QUESTION}]
    turns = [{"role": "user", "content": content}, {"role": "assistant", "content": _ANSWER}]
    try:
        text = tokenizer.apply_chat_template(turns, tokenize=False)
    except (TemplateError, TypeError, ValueError, LookupError, AttributeError) as error:
        return first_line(error)
    before, words, _ = text.partition(_QUESTION)
    if not words or before.endswith(("'", '"')):
        return "the user's words are not there" if not words else "it prints the message as Python does"
    if (slots := text.count("<|image_pad|>")) != images:
        return f"{slots} of <|image_pad|> for {images} image{'' if images == 1 else 's'}"
    last = text.rpartition("<|im_start|>")[2]
    if not last.startswith("assistant") or f"{_ANSWER}<|im_end|>" not in last:
        return "the answer does not stand between <|im_start|>assistant and <|im_end|>"
    return None
