"""Pictures of a run: every rank computes what they show, and the main rank draws it.

They are PNG files in the run's folder `pictures`; the record brings them to MLflow.
"""

from __future__ import annotations

import logging
import re
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from ilvr_ds import dist
from ilvr_ds.pictures.views import SampleView
from ilvr_ds.tracking.record import read_record
from ilvr_ds.tracking.tracker import Tracker
from ilvr_ds.training.latent_views import LatentViews

logger = logging.getLogger("ilvr_ds")
PANELS = {
    "losses": ("loss/total", "loss/ce", "loss/alignment", "loss/contrastive"),
    "cross-entropy by kind of task": ("loss/ce_by_type/",),
    "cross-entropy by data set": ("loss/ce_by_set/", "eval/ce_by_set/"),
    "held-out losses": ("eval/ce", "eval/alignment", "eval/contrastive"),
    "targets: alike across samples, changed": (
        "select/target_similarity",
        "select/changed_share",
        "select/unchanged",
    ),
    "answer accuracy, teacher-forced": ("train/answer_accuracy", "eval/answer_accuracy", "eval/answer_accuracy/"),
}
"""Metrics of each panel of the curves; a name that ends in a slash stands for all that begin with it."""


class Pictures:
    """Draws the record's curves and, with `latent_views`, samples, in a thread beside training."""

    def __init__(self, tracker: Tracker, directory: Path, latent_views: LatentViews | None = None) -> None:
        self.tracker = tracker
        self.record = directory / "metrics.jsonl"
        self.folder = directory / "pictures"
        self.latent_views = latent_views
        self._drawing: threading.Thread | None = None

    def __call__(self, done: int) -> None:
        """Compute the views after `done` steps (collective), and begin to draw on the main rank."""
        start = time.monotonic()
        self.finish()
        views = self.latent_views() if self.latent_views else []
        if dist.is_main():
            self._drawing = threading.Thread(target=self._draw, args=(views, done), name="pictures", daemon=True)
            self._drawing.start()
        self.tracker.log(done, {"pictures/stall_seconds": time.monotonic() - start})

    def finish(self) -> None:
        """Wait for the drawing thread."""
        if self._drawing:
            self._drawing.join()

    def _draw(self, views: list[SampleView], done: int) -> None:
        """A disk that takes no picture is reported; training goes on."""
        from ilvr_ds.pictures.charts import draw_curves  # imports matplotlib, which only the main rank needs
        from ilvr_ds.pictures.selection import draw_latents, draw_selection

        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            for number, view in enumerate(views, start=1):
                if view.segments[0].selection:
                    self._picture(done, f"selection/sample {number}", partial(draw_selection, view, done))
                self._picture(done, f"latents/sample {number}", partial(draw_latents, view, done))
            if panels := panels_of(self.record, done):
                self._picture(done, "curves", partial(draw_curves, panels))
        except OSError as error:
            logger.warning("step %d: no pictures in %s: %s", done, self.folder, error.strerror or error)

    def _picture(self, done: int, key: str, draw: Callable[[Path], None]) -> None:
        """One PNG file, and its line in the record; `key` is its name in MLflow."""
        start = time.monotonic()
        path = self.folder / f"{re.sub('[/ ]', '-', key)}-step-{done:08d}.png"
        draw(path)
        self.tracker.picture(done, key, path.name, time.monotonic() - start)


def panels_of(record: Path, last_step: int) -> dict[str, dict[str, tuple[list[int], list[float]]]]:
    """Steps and values of what PANELS names up to `last_step`; steps trained again replace the first."""
    points: dict[str, dict[int, float]] = {}
    for line, _ in read_record(record):
        for name, value in line.get("metrics", {}).items():
            if line["step"] <= last_step:
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
