"""Letters that matplotlib's font lacks: drawn with an installed font that has them, else said once."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from fontTools.fontBuilder import FontBuilder
from fontTools.pens.ttGlyphPen import TTGlyphPen
from matplotlib.font_manager import fontManager
from PIL import Image

from ilvr_ds.pictures import fonts
from ilvr_ds.pictures.charts import Bar, draw_accuracy
from ilvr_ds.pictures.page import Page, wrapped

HAN, OTHER = "\u8a08", "\u6578"


def write_font(path: Path) -> None:
    """A font of one letter, a square that is black all over: neither a real letter nor the box of a missing one is."""
    pen = TTGlyphPen(None)
    pen.moveTo((0, 0))
    for corner in ((0, 800), (1000, 800), (1000, 0)):
        pen.lineTo(corner)
    pen.closePath()
    square = pen.glyph()
    builder = FontBuilder(1000)
    builder.setupGlyphOrder([".notdef", "han"])
    builder.setupCharacterMap({ord(HAN): "han"})
    builder.setupGlyf({".notdef": TTGlyphPen(None).glyph(), "han": square})
    builder.setupHorizontalMetrics({".notdef": (1000, 0), "han": (1000, 0)})
    builder.setupHorizontalHeader(ascent=800, descent=-200)
    builder.setupNameTable({"familyName": "Test Han", "styleName": "Regular"})
    builder.setupOS2(sTypoAscender=800, usWinAscent=800, usWinDescent=200)
    builder.setupPost()
    builder.save(path)


def forget() -> None:
    fonts._installed_font.cache_clear()
    fonts._installed_fonts.cache_clear()
    fonts._missing_was_said = False


@pytest.fixture
def han(tmp_path: Path) -> Iterator[None]:
    """A font with one Han letter is installed."""
    before = list(fontManager.ttflist)
    write_font(tmp_path / "han.ttf")
    fontManager.addfont(tmp_path / "han.ttf")
    forget()
    yield
    fontManager.ttflist[:] = before
    forget()


@pytest.fixture
def no_han(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Only matplotlib's own fonts are there, whatever this machine has."""
    own = [font for font in fontManager.ttflist if Path(font.fname).is_relative_to(fonts.OWN)]
    monkeypatch.setattr(fontManager, "ttflist", own)
    forget()
    yield
    forget()


def longest_black_row(path: Path) -> int:
    """Pixels of the longest run of black in a picture: 9 and more are the square, strokes of letters are shorter."""
    dark = np.asarray(Image.open(path).convert("L")) < 60
    filled = dark[2:, :] & dark[1:-1, :] & dark[:-2, :]  # three rows thick: no line of axes or letters
    longest = run = 0
    for row in filled:
        for pixel in row:
            run = run + 1 if pixel else 0
            longest = max(longest, run)
    return longest


def test_a_letter_is_drawn_with_a_font_that_has_it_on_pages(han: None, tmp_path: Path) -> None:
    page = Page(40)
    page.words(5, 5, f"Count ({HAN}) 3")
    page.save(tmp_path / "page.png")
    assert longest_black_row(tmp_path / "page.png") >= 9


def test_a_letter_is_drawn_with_a_font_that_has_it_in_charts(han: None, tmp_path: Path) -> None:
    """In the title and in the names at the axis, which are no texts before they are drawn."""
    for number, (title, name) in enumerate([(HAN, "a"), ("a", HAN)]):
        draw_accuracy(title, [Bar(name, 0.0, 0.0, 0.5, 4, None)], tmp_path / f"{number}.png")
        assert longest_black_row(tmp_path / f"{number}.png") >= 9, (title, name)


def test_a_letter_that_no_font_has_is_said_once(no_han: None, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "ilvr_ds"):
        for _ in range(2):
            page = Page(40)
            page.words(5, 5, f"{HAN}{OTHER} Grün: 3°\tB")
            page.save(tmp_path / "page.png")
        draw_accuracy(HAN, [Bar("a", 0.5, 0.2, 0.8, 4, None)], tmp_path / "chart.png")
    assert [record.getMessage() for record in caplog.records] == [
        f"pictures: no installed font has '{HAN}', shown as a box; "
        "install one (for Chinese, Japanese and Korean fonts-noto-cjk)"
    ]


def test_matplotlibs_own_fonts_are_never_the_answer(no_han: None) -> None:
    """Its last resort has every letter, as boxes."""
    assert fonts.font_of(HAN) is None and fonts.font_of("A") is None


def test_wide_letters_take_two_columns() -> None:
    assert wrapped(HAN * 10, 10, 9) == "\n".join([HAN * 5] * 2)
    assert wrapped("abcde fgh", 10, 9) == "abcde fgh"
    assert wrapped("abcde fghijk", 10, 9) == "abcde\nfghijk"
