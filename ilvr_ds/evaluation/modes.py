"""How a model is made to answer: with its latents, in words, or at once.

latent: as it was trained; the question stands alone. cot and direct: no segment is opened, and behind the question
stands what is asked for: a reasoning in words, or the answer alone. A model without latent tokens, such as the base
before training, answers in words unless it is told otherwise.
"""

from __future__ import annotations

from typing import Literal, cast, get_args

from ilvr_ds.errors import UserError, nearest

Mode = Literal["latent", "cot", "direct"]
MODES: tuple[Mode, ...] = get_args(Mode)
AUTO = "auto"
_ASKED = {
    "latent": "",
    "cot": "Think step by step, then end with a line of this form: {form}",
    "direct": "Write a line of this form and nothing else: {form}",
}


def check_mode(mode: str) -> None:
    """Raise UserError for a mode that there is not."""
    if mode not in (AUTO, *MODES):
        raise UserError(f"--mode: '{mode}' is unknown{nearest(mode, (AUTO, *MODES))}")


def choose_mode(mode: str, has_latents: bool) -> Mode:
    """The mode that a checked `--mode` stands for."""
    return cast(Mode, mode) if mode != AUTO else "latent" if has_latents else "cot"


def instruction_of(mode: Mode, form: str) -> str:
    """What stands behind a question; "" for nothing. form: how a benchmark wants an answer to be written; "" where its
    questions say it themselves."""
    return _ASKED[mode].format(form=form) if form else ""
