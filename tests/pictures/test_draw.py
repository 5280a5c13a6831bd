from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from ilvr_ds.pictures import charts
from ilvr_ds.pictures.charts import AblationBar, Bar, draw_ablation, draw_accuracy, draw_curves
from ilvr_ds.pictures.page import coloured
from ilvr_ds.pictures.selection import draw_latents, draw_selection
from ilvr_ds.pictures.style import COLOURS, DPI, WIDTH_IN
from ilvr_ds.pictures.views import SampleView, SegmentView, Selection

HELPER = (10, 200, 90)
WIDTH = int(WIDTH_IN * DPI)
VERMILION = tuple(int(COLOURS[3][start : start + 2], 16) for start in (1, 3, 5))


def segment(rows: int, columns: int, slots: int, selected: list[int] | None) -> SegmentView:
    """`selected` None: without a teacher."""
    rng = np.random.default_rng(0)
    cosine = rng.random((rows, columns)).astype(np.float32)
    cells = tuple(((cell // columns, cell % columns),) for cell in selected or [])
    return SegmentView(
        text="It costs $5 and $6, or {x}_1 \\frac: ",
        helper=np.full((rows * 28, columns * 28, 3), HELPER, dtype=np.uint8),
        latents=rng.random((slots, rows, columns)).astype(np.float32),
        selection=None if selected is None else Selection(cosine, cells),
    )


def sample(*segments: SegmentView, images: int = 1) -> SampleView:
    inputs = tuple(np.zeros((40, 60, 3), dtype=np.uint8) for _ in range(images))
    return SampleView("id-1", "", "Which one?\n" + "A long question. " * 60, "B", inputs, segments)


def opened(path: Path) -> Image.Image:
    assert [file.name for file in path.parent.iterdir()] == [path.name], "no half-written file stays"
    return Image.open(path).convert("RGB")


@pytest.mark.parametrize(
    "view",
    [
        sample(segment(4, 4, 4, [0, 5, 15])),
        sample(segment(1, 1, 1, [0]), images=0),
        sample(*[segment(3, 16, 12, [7, 8])] * 9, images=3),
        sample(segment(2, 2, 2, [])),
        sample(segment(16, 3, 4, None)),
    ],
)
def test_any_number_of_segments_slots_and_images_is_drawn(view: SampleView, tmp_path: Path) -> None:
    """Catches text that is read as a formula, and panels that do not fit their page."""
    drawings = {"selection": draw_selection} if view.segments[0].selection else {}
    for name, draw in (drawings | {"latents": draw_latents}).items():
        (tmp_path / name).mkdir()
        draw(view, 7, tmp_path / name / "a.png")
        assert opened(tmp_path / name / "a.png").width == WIDTH


def test_selected_patches_are_outlined(tmp_path: Path) -> None:
    """Catches outlines that are missing, or stand where rows and columns are mixed up."""
    view = sample(segment(2, 4, 2, [3]))
    draw_selection(view, 0, tmp_path / "a.png")
    pixels = np.asarray(opened(tmp_path / "a.png")).astype(int)
    rows, columns = np.nonzero(np.abs(pixels - VERMILION).sum(2) < 30)
    assert len(rows), "there is an outline"
    left, right = columns.min(), columns[columns < WIDTH * 0.676].max()  # behind it the heat map begins
    height, width = rows.max() - rows.min(), right - left
    assert abs(height - width) < 6, "one square patch"
    helper = np.nonzero((pixels == HELPER).all(2).any(0))[0]
    assert right >= helper.max() - 4, "in the last column"


def test_the_map_is_pale_where_a_patch_was_not_in_the_pool(tmp_path: Path) -> None:
    """Catches rows and columns mixed up: of 2 x 4 patches the last one of the first row is in the pool."""
    view = segment(2, 4, 2, [3])
    assert view.selection is not None
    full = replace(view, selection=replace(view.selection, score=np.zeros((2, 4), dtype=np.float32)))
    assert full.selection is not None
    pooled = replace(full, selection=replace(full.selection, pool=frozenset({(0, 3)})))
    pixels = []
    for number, drawn in enumerate((full, pooled)):
        (tmp_path / f"{number}").mkdir()
        draw_selection(sample(drawn), 0, tmp_path / f"{number}" / "a.png")
        pixels.append(np.asarray(opened(tmp_path / f"{number}" / "a.png")).astype(int))
    assert all((page[:, WIDTH - 4 :] == 255).all() for page in pixels), "no words that the edge cuts"
    cold = coloured(np.zeros((1, 1), dtype=np.float32), 0, 1)[0, 0]
    right = slice(int(WIDTH * 0.68), WIDTH - 60)
    everywhere, there = (np.nonzero((page == cold).all(2)[:, right]) for page in pixels)
    assert there[1].min() > np.median(everywhere[1]) and there[0].max() <= np.median(everywhere[0]) + 4
    assert 0.05 < len(there[0]) / len(everywhere[0]) < 0.2, "an eighth of the map"


def test_without_a_teacher_the_patch_closest_to_each_latent_is_outlined(tmp_path: Path) -> None:
    """Catches a map that is turned or shifted against the helper image."""
    view = segment(2, 4, 1, None)
    view.latents[0] = 0.0
    view.latents[0, 1, 3] = 1.0
    draw_latents(sample(view), 0, tmp_path / "a.png")
    pixels = np.asarray(opened(tmp_path / "a.png")).astype(int)
    _, columns = np.nonzero(np.abs(pixels - VERMILION).sum(2) < 30)
    helper = np.nonzero((pixels == HELPER).all(2).any(0))[0]
    assert len(columns) and columns.min() > (helper.min() + helper.max()) / 2 + 40, "in the last column of the helper"
    warm = np.nonzero((pixels == coloured(np.ones((1, 1), dtype=np.float32), 0, 1)[0, 0]).all(2).any(0))[0]
    outlined = columns[columns > helper.max() + 8]
    assert outlined.min() - 4 < warm[warm > helper.max() + 8].min() < outlined.max(), "and where its map is warm"


def test_latents_that_are_not_finite_are_drawn(tmp_path: Path) -> None:
    """Catches a run that ends because of a picture."""
    for number, view in enumerate((segment(2, 2, 2, [1]), segment(2, 2, 2, None))):
        draw_latents(sample(replace(view, latents=view.latents * np.nan)), 0, tmp_path / f"{number}.png")
        assert Image.open(tmp_path / f"{number}.png").width == WIDTH


def test_charts_are_drawn(tmp_path: Path) -> None:
    drawings = {
        "curves": lambda path: draw_curves({"a": {"x": ([1, 2], [0.5, 0.25])}, "b": {"y": ([1], [2.0])}}, path),
        "accuracy": lambda path: draw_accuracy(
            "t", [Bar("a", 0.5, 0.2, 0.8, 4, 0.25), Bar("b", 1.0, 0.2, 1.0, 1, None)], path
        ),
        "ablation": lambda path: draw_ablation("t", 0.5, [AblationBar("zeros", 0.25, -0.25, -0.5, 0.1)], path),
    }
    for name, draw in drawings.items():
        (tmp_path / name).mkdir()
        draw(tmp_path / name / "a.png")
        picture = opened(tmp_path / name / "a.png")
        assert picture.width == WIDTH and len(picture.getcolors(10**6) or []) > 10


def test_a_replacement_is_drawn_at_its_difference_with_the_interval_of_that(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches the difference to the accuracy of all samples where a replacement covers some, and ends swapped over."""
    figures: list[Figure] = []
    monkeypatch.setattr(charts, "save", lambda figure, path: figures.append(figure))
    bars = [AblationBar("true", 0.9, 0.1, 0.02, 0.3), AblationBar("zeros", 0.25, -0.25, -0.5, 0.1)]
    draw_ablation("t", 0.5, bars, tmp_path / "a.png")
    assert drawn_differences(figures[0]) == [pytest.approx((0.1, 0.02, 0.3)), pytest.approx((-0.25, -0.5, 0.1))]
    with pytest.raises(ValueError, match="negative"):
        draw_ablation("t", 0.5, [AblationBar("true", 0.9, 0.4, 0.02, 0.3)], tmp_path / "a.png")


def drawn_differences(figure: Figure) -> list[tuple[float, float, float]]:
    """Where a row's dot and the ends of its bar stand."""
    dots, _, (bars,) = figure.axes[0].containers[0]
    ends = [segment[:, 0] for segment in bars.get_segments()]
    return [(float(dot), float(low), float(high)) for dot, (low, high) in zip(dots.get_xdata(), ends, strict=True)]
