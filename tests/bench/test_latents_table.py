"""Tables and bars of results that were written by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ilvr_ds.evaluation.intervals import share_interval
from tests.bench.latents_operations import operations_table
from tests.bench.latents_table import bars_of, draw_results, read_results, table


def write(folder: Path, *lines: dict[str, Any]) -> Any:
    """Groups of a results.jsonl with these lines, each like a whole first stage of seed 0 unless it says otherwise."""
    usual = {"arm": "changed", "signs": 6, "seed": 0, "stage": "1", "own": 0.5, "steps": 900, "planned_steps": 900}
    file = folder / "results.jsonl"
    file.write_text("".join(json.dumps(usual | line) + "\n" for line in lines))
    return read_results(file)


def stages(groups: Any) -> list[str]:
    return [row.split(" | ")[2] for row in table(groups)[2:]]


def test_what_ended_early_is_marked_and_what_goes_on_from_it(tmp_path: Path) -> None:
    """Catches an arm that --minutes cut, shown as if it had been trained to its end."""
    cut = {"steps": 412}
    groups = write(
        tmp_path, {}, cut | {"seed": 1}, {"stage": "detached", "steps": 100, "planned_steps": 100, "seed": 1},
        {"arm": "text"},
    )  # fmt: skip
    early = "ended early, seed 1: 412 of 900 steps of stage 1"
    assert stages(groups) == [f"1 ({early})", f"2, detached ({early})", "1"]
    assert [bar.name for bar in bars_of(groups)] == [
        "changed, ended early", "changed, detached, ended early", "text"
    ]  # fmt: skip
    both = write(tmp_path, cut, {"stage": "full", "steps": 7, "planned_steps": 100})
    assert stages(both)[1].endswith("seed 0: 412 of 900 steps of stage 1; seed 0: 7 of 100 steps of stage 2)")


def test_arms_after_a_look_that_ended_early_are_marked(tmp_path: Path) -> None:
    look = {"arm": "look", "signs": 0, "steps": 30, "planned_steps": 400, "by_operation": {}}
    groups = write(tmp_path, look, {"signs": 0, "by_operation": {"update": {"own": 0.5}}})
    early = "1 (ended early, seed 0: 30 of 400 steps of look)"
    assert stages(groups) == [early, early]
    assert operations_table(groups)[2].startswith(f"| changed | {early} | update | 50.0 |")


def test_lines_from_before_plans_were_written_are_shown_as_they_were(tmp_path: Path) -> None:
    """--table-only of an older folder."""
    file = tmp_path / "results.jsonl"
    file.write_text(json.dumps({"arm": "text", "signs": 6, "seed": 0, "stage": "1", "own": 0.25, "steps": 850}) + "\n")
    groups = read_results(file)
    assert table(groups)[2] == "| text | 6 | 1 | 1 | 25.0 |"
    [bar] = bars_of(groups)
    assert bar.samples is None and np.isnan([bar.low, bar.high]).all(), "how many answers there were is not known"
    draw_results(groups, tmp_path / "results.png")
    assert (tmp_path / "results.png").stat().st_size > 5_000


def test_bars_have_the_samples_of_their_readings_and_the_interval_that_belongs_to_them(tmp_path: Path) -> None:
    """Catches an n of today's options, and one seed with an interval without width."""
    one = {"zeros": 0.25, "samples": {"own": 512, "zeros": 400}}
    own, zeros = bars_of(write(tmp_path, one))
    assert (own.samples, zeros.samples) == (512, 400)
    assert (own.low, own.high) == share_interval(256, 512) and (zeros.low, zeros.high) == share_interval(100, 400)
    groups = write(tmp_path, one, one | {"own": 0.51, "seed": 1})
    own, _ = bars_of(groups)
    assert own.samples == 1024 and own.accuracy == pytest.approx(0.505)
    assert own.high - own.accuracy == pytest.approx(12.71 * 0.005), "Student's t of two seeds"
    draw_results(groups, tmp_path / "results.png")
