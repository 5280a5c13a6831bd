"""The pictures of an audit: replacements with intervals, retrieval beside chance, where some latents look."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ilvr_ds.evaluation.charts import share_bar
from ilvr_ds.pictures.charts import AblationBar, draw_ablation, draw_accuracy
from ilvr_ds.pictures.selection import draw_latents
from ilvr_ds.pictures.views import SampleView


def draw_audit(report: dict[str, Any], views: Sequence[SampleView], folder: Path) -> list[Path]:
    """Draw what audit.json holds, and `views`, into `folder`; returns the PNG files."""
    files = []
    if replaced := report.get("replacement"):
        bars = [
            AblationBar(
                name + f", n = {part['samples']}" * (part["samples"] < report["samples"]),
                part["accuracy"],
                part["difference"],
                *part["interval_95"],
            )
            for name, part in replaced.items()
            if name != "own"
        ]
        files.append(folder / "replacement.png")
        draw_ablation(
            f"{report['samples']} samples: what other latents do", replaced["own"]["accuracy"], bars, files[-1]
        )
    retrieval = report.get("inside", {}).get("retrieval", {})
    if retrieval.get("latents"):
        bars_of_hits = [
            share_bar(
                f"top {k}, {words}", retrieval[name][f"top_{k}"], retrieval["samples"], retrieval[name][f"chance_{k}"]
            )
            for name, words in (("image", "own helper image"), ("others", "other samples"))
            for k in (1, 5)
        ]
        files.append(folder / "retrieval.png")
        draw_accuracy("latents that are nearest to their target (95 % interval)", bars_of_hits, files[-1])
    for number, view in enumerate(views, start=1):
        files.append(folder / f"latents-{number}.png")
        draw_latents(view, None, files[-1])
    return files
