from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from ilvr_ds.errors import UserError
from ilvr_ds.tracking.compare import compare

END = {"event": "end", "status": "FINISHED"}


def write(folder: Path, recipe: dict[str, Any], lines: list[dict[str, Any]]) -> Path:
    folder.mkdir(parents=True)
    (folder / "recipe.json").write_text(json.dumps(recipe))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def metrics(step: int, **values: Any) -> dict[str, Any]:
    return {"step": step, "time": 0.0, "metrics": {name.replace("__", "/"): value for name, value in values.items()}}


def test_only_what_differs_and_the_last_metrics_are_shown(tmp_path: Path) -> None:
    """Catches the first value in place of the last, and settings that are equal."""
    a = write(
        tmp_path / "a",
        {"run": {"name": "a", "seed": 0}, "optim": {"lr": 1e-5, "beta1": 0.9}},
        [metrics(1, loss__ce=3.0), metrics(2, loss__ce=2.0), metrics(2, eval__ce=1.5), END],
    )  # fmt: skip
    other = {"run": {"name": "b", "seed": 0}, "optim": {"lr": 2e-5, "beta1": 0.9}}
    b = write(tmp_path / "b", other, [metrics(1, loss__ce="nan")])
    lines = [line.split() for line in compare([a, b])]
    assert lines[0] == ["a", "b"]
    assert ["optim.lr", "1e-05", "2e-05"] in lines and ["step", "2", "1"] in lines
    assert ["ended", "finished", "not", "yet"] in lines
    assert ["loss/ce", "2", "nan"] in lines and ["eval/ce", "1.5", "-"] in lines
    assert not [line for line in lines if line[0] in ("run.name", "run.seed", "optim.beta1")]


def test_runs_of_one_name_are_told_apart_by_their_folders(tmp_path: Path) -> None:
    folders = [write(tmp_path / parent / "run", {"run": {}}, [metrics(1, loss__ce=1.0)]) for parent in "ab"]
    assert compare(folders)[0].split() == [str(folder) for folder in folders]


def test_a_folder_that_is_no_run_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"is not the folder of a run \(recipe.json is missing\)"):
        compare([tmp_path])
