"""A run that selects among what changed is the same on any number of ranks, and says what it selected."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.distributed.test_runs import overrides
from tests.ranks import run_ranks
from tests.recipes import RECIPE


def test_a_pool_of_what_changed_is_the_same_on_two_ranks(demo_folder: Path, tmp_path: Path) -> None:
    """Catches pools and metrics that depend on which samples share a rank or a micro-batch."""
    weights, metrics = {}, {}
    for world in (1, 2):
        folder = tmp_path / f"{world}"
        changes = {"selection__pool": "changed", "train__max_steps": 3, "train__grad_accum_steps": 2 // world}
        arguments = overrides(folder, demo_folder, **changes, tracking__picture_samples=1)
        results = run_ranks("tests.distributed.workers_run:train", world, folder / "ranks", recipe=RECIPE,
                            overrides=arguments)  # fmt: skip
        weights[world] = results[0]["weights"]
        lines = [json.loads(line) for line in (folder / "demo/metrics.jsonl").read_text().splitlines()]
        logged = {line["step"]: line["metrics"] for line in lines if "loss/ce" in line.get("metrics", {})}
        metrics[world] = {
            s: {n: v for n, v in m.items() if n.startswith(("select/", "loss/"))} for s, m in logged.items()
        }
        assert any("selection" in file.name for file in (folder / "demo/pictures").iterdir())
    assert list(metrics[1]) == [1, 2, 3]
    for step, values in metrics[1].items():
        assert metrics[2][step] == pytest.approx(values, rel=1e-4)
        assert 1 <= values["select/kept_per_segment"] <= 4 and values["select/pool_size"] < 8
        assert 0.5 < values["select/changed_share"] <= 1 and 0 <= values["select/unchanged"] < 0.2
        assert -1 < values["select/target_similarity"] < 1
    for name, weight in weights[1].items():
        if name.endswith("k_proj.bias"):  # moves no attention: its gradient is rounding, which Adam enlarges
            continue
        assert float((weight - weights[2][name]).norm() / weight.norm()) < 1e-5, name
