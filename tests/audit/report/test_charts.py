"""What is drawn of an audit is what audit.json says."""

from __future__ import annotations

from pathlib import Path

import pytest
from matplotlib.figure import Figure

from ilvr_ds.audit.report import summary
from ilvr_ds.audit.report.charts import draw_audit
from ilvr_ds.pictures import charts
from tests.pictures.test_draw import drawn_differences


def test_a_replacement_of_some_samples_is_drawn_beside_their_own_answers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The samples with true features are the easy ones, all right either way. Catches them set against all samples,
    half of which are wrong: a gain of 50 points that nobody measured, with the interval of another."""

    def part(has_source: bool, right: bool) -> dict[str, object]:
        return {"has_source": has_source, "right": right, "logp": -1.0, "changed": False}

    lines = [
        {"right": is_easy, "own_logp": -1.0, "replacement": {"zeros": part(True, False), "true": part(is_easy, True)}}
        for is_easy in [True, False] * 20
    ]
    replaced = summary.replacement(lines, ["zeros", "true"])
    figures: list[Figure] = []
    monkeypatch.setattr(charts, "save", lambda figure, path: figures.append(figure))
    draw_audit({"samples": 40, "replacement": replaced}, [], tmp_path)
    drawn = drawn_differences(figures[0])
    said = [(part["difference"], *part["interval_95"]) for part in (replaced["zeros"], replaced["true"])]
    assert drawn == [pytest.approx(numbers) for numbers in said]
    assert [numbers[0] for numbers in drawn] == [-0.5, 0.0]
    names = [label.get_text() for label in figures[0].axes[0].get_yticklabels()]
    assert names == ["zeros (0.00)", "true, n = 20 (1.00)"]
