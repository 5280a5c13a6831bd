"""How to generate, and how fast it was."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class GenerationSettings:
    """How to generate. `forced` (number of the new token, from 0, to its id) and `forbidden` steer tests."""

    max_new_tokens: int = 1024
    """Limit of all emitted tokens, latent ones included."""
    temperature: float = 0.0
    """0 is greedy."""
    top_p: float = 1.0
    seed: int = 0
    stop: tuple[str, ...] = ()
    """Texts after which an answer ends; they stay in it."""
    keep_latents: bool = False
    forced: Mapping[int, int] = field(default_factory=dict)
    forbidden: tuple[int, ...] = ()


@dataclass(frozen=True)
class Speed:
    """Tokens and seconds of prefill (prompts, images included) and of decoding (all rows, latent steps included)."""

    prefill_tokens: int = 0
    prefill_s: float = 0.0
    decode_tokens: int = 0
    decode_s: float = 0.0

    def __add__(self, other: Speed) -> Speed:
        return Speed(*(getattr(self, name) + getattr(other, name) for name in self.__dataclass_fields__))

    def __sub__(self, other: Speed) -> Speed:
        return Speed(*(getattr(self, name) - getattr(other, name) for name in self.__dataclass_fields__))

    def in_words(self) -> str:
        """Tokens, and how many came in a second."""
        rates = self.to_dict()
        return (
            f"{self.decode_tokens} tokens; prefill {rates['prefill_tokens_per_s']:.0f}, "
            f"decode {rates['decode_tokens_per_s']:.1f} tokens a second"
        )

    def to_dict(self) -> dict[str, float]:
        """The numbers, with tokens per second."""
        rates = {
            "prefill_tokens_per_s": self.prefill_tokens / max(self.prefill_s, 1e-9),
            "decode_tokens_per_s": self.decode_tokens / max(self.decode_s, 1e-9),
        }
        return {**{name: getattr(self, name) for name in self.__dataclass_fields__}, **rates}
