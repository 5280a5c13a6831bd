"""Pictures of a run: when they are due, every rank looks and the main rank draws.

They go into the run's folder `pictures` and, by the record, to MLflow.
"""

from __future__ import annotations

import time
from pathlib import Path

from ilvr_ds import dist
from ilvr_ds.training.gaze import Gaze
from ilvr_ds.training.record import read_record
from ilvr_ds.training.tracking import Tracker

PANELS = {
    "losses": ("loss/total", "loss/ce", "loss/alignment", "loss/contrastive"),
    "cross-entropy by kind of task": ("loss/ce_by_type/",),
    "held-out losses": ("eval/ce", "eval/alignment", "eval/contrastive"),
    "answer accuracy, teacher-forced": ("train/answer_accuracy", "eval/answer_accuracy", "eval/answer_accuracy/"),
}
"""Metrics of each panel of the curves; a name that ends in a slash stands for all that begin with it."""


class Pictures:
    """Draws the record's curves and, with a gaze, samples."""

    def __init__(self, tracker: Tracker, directory: Path, gaze: Gaze | None = None) -> None:
        self.tracker = tracker
        self.record = directory / "metrics.jsonl"
        self.folder = directory / "pictures"
        self.gaze = gaze

    def __call__(self, done: int) -> None:
        """Draw after `done` steps (collective). A disk that takes no picture is reported; training goes on."""
        start = time.monotonic()
        views = self.gaze() if self.gaze else []
        if not dist.is_main():
            return
        from ilvr_ds.pictures.selection import draw_latents, draw_selection  # brings matplotlib

        try:
            self.folder.mkdir(exist_ok=True)
            for number, view in enumerate(views, start=1):
                for kind, draw in (("selection", draw_selection), ("latents", draw_latents)):
                    draw(view, done, self._file(f"{kind}-{number}", done))
                    self.tracker.picture(done, f"{kind}/sample {number}", self._file(f"{kind}-{number}", done).name)
            self._draw_curves(done)
        except OSError as error:
            dist.warn("step %d: no pictures in %s: %s", done, self.folder, error.strerror or error)
        self.tracker.log(done, {"pictures/seconds": time.monotonic() - start})

    def _draw_curves(self, done: int) -> None:
        from ilvr_ds.pictures.charts import draw_curves

        if panels := panels_of(self.record):
            draw_curves(panels, self._file("curves", done))
            self.tracker.picture(done, "curves", self._file("curves", done).name)

    def _file(self, name: str, done: int) -> Path:
        return self.folder / f"{name}-step-{done:08d}.png"


def panels_of(record: Path) -> dict[str, dict[str, tuple[list[int], list[float]]]]:
    """Steps and values of what PANELS names, in the order of the record; steps trained again replace the first."""
    points: dict[str, dict[int, float]] = {}
    for line, _ in read_record(record):
        for name, value in line.get("metrics", {}).items():
            points.setdefault(name, {})[line["step"]] = float(value)
    panels = {}
    for title, wanted in PANELS.items():
        starts = tuple(name for name in wanted if name.endswith("/"))
        names = [name for name in points if name in wanted or (starts and name.startswith(starts))]
        if names:
            panels[title] = {name: _in_order(points[name]) for name in names}
    return panels


def _in_order(points: dict[int, float]) -> tuple[list[int], list[float]]:
    steps = sorted(points)
    return steps, [points[step] for step in steps]
