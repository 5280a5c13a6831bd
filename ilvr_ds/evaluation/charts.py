"""Scores as pictures: accuracy by kind of task against chance, and what other latents do to it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ilvr_ds.evaluation.intervals import share_interval
from ilvr_ds.pictures.charts import AblationBar, Bar, draw_ablation, draw_accuracy


def share_bar(name: str, share: float, samples: int, chance: float | None) -> Bar:
    """The bar of a share of so many samples, with Wilson's interval."""
    count = max(1, samples)
    return Bar(name, share, *share_interval(share * count, count), samples, chance)


def draw_scores(scores: dict[str, Any], benchmark: str, folder: Path) -> list[Path]:
    """Draw what scores.json holds into `folder`; returns the PNG files."""
    files = []
    for rule, part in scores["rules"].items():
        types = part["types"].items()
        bars = [share_bar(name or "(no type)", s["accuracy"], s["samples"], s["chance"]) for name, s in types]
        files.append(folder / f"accuracy-{rule}.png")
        draw_accuracy(f"{benchmark}, rules {rule}: accuracy {part['accuracy']:.3f} (95 % interval)", bars, files[-1])
    for rule, effects in scores.get("ablation", {}).items():
        changes = [AblationBar(name, e["accuracy"], e["difference"], *e["interval_95"]) for name, e in effects.items()]
        files.append(folder / f"ablation-{rule}.png")
        title = f"{benchmark}, rules {rule}: do the latents matter?"
        draw_ablation(title, scores["rules"][rule]["accuracy"], changes, files[-1])
    return files
