"""Finds an installed font for letters that matplotlib's own lacks; without one they are drawn as boxes."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from functools import cache
from itertools import groupby
from pathlib import Path

from matplotlib import get_data_path
from matplotlib.figure import Figure
from matplotlib.font_manager import FontEntry, fontManager
from matplotlib.ft2font import FT2Font
from matplotlib.text import Text

logger = logging.getLogger("ilvr_ds")
OWN = Path(get_data_path(), "fonts/ttf")
"""The fonts that come with matplotlib."""
_FIRST_HAN = 0x2E80


def font_of(letter: str) -> FontEntry | None:
    """The installed font to draw a letter with; None: matplotlib's own, which has it unless no font does."""
    return None if ord(letter) in _own_letters() or not letter.isprintable() else _installed_font(letter)


def runs(text: str) -> Iterator[tuple[FontEntry | None, str]]:
    """A line in pieces of one font each, as font_of chooses."""
    for font, letters in groupby(text, font_of):
        yield font, "".join(letters)


def choose_fonts(figure: Figure) -> None:
    """Give every text of a figure the fonts that its letters need."""
    for axes in figure.axes:  # tick labels exist only once asked for
        axes.get_xticklabels(), axes.get_yticklabels()
    for text in figure.findobj(Text):
        assert isinstance(text, Text)
        if families := list(dict.fromkeys(font.name for font, _ in runs(text.get_text()) if font)):
            text.set_fontfamily([*text.get_fontfamily(), *families])


@cache
def _own_letters() -> frozenset[int]:
    return frozenset(FT2Font(str(OWN / "DejaVuSans.ttf")).get_charmap())


@cache
def _installed_font(letter: str) -> FontEntry | None:
    for font, letters in _installed_fonts():
        if ord(letter) in letters:
            return font
    _say_missing(letter)
    return None


@cache
def _installed_fonts() -> list[tuple[FontEntry, frozenset[int]]]:
    """One upright font of each family with its letters, largest first; read when first needed."""
    families: dict[str, FontEntry] = {}
    for font in fontManager.ttflist:
        is_plain = font.style == "normal" and font.weight in (400, "normal", "regular")
        if is_plain and not Path(font.fname).is_relative_to(OWN) and "LastResort" not in font.name.replace(" ", ""):
            families.setdefault(font.name, font)
    found = [(font, _letters(font.fname)) for font in families.values()]
    return sorted(found, key=lambda item: (-(len(item[1]) // 1000), "Serif" in item[0].name, item[0].name))


def _letters(file: str) -> frozenset[int]:
    """Code points of a font; none if it cannot be read or scaled (bitmap emoji)."""
    try:
        font = FT2Font(file)
    except (OSError, RuntimeError) as error:
        logger.debug("%s: not a usable font (%s)", file, error)
        return frozenset()
    return frozenset(font.get_charmap()) if font.scalable else frozenset()


_missing_was_said = False


def _say_missing(letter: str) -> None:
    """Warn once per process: training goes on, and the next picture lacks the same letters."""
    global _missing_was_said
    if not _missing_was_said:
        package = "for Chinese, Japanese and Korean fonts-noto-cjk" if ord(letter) >= _FIRST_HAN else "as fonts-noto"
        logger.warning("pictures: no installed font has '%s', shown as a box; install one (%s)", letter, package)
    _missing_was_said = True
