"""What looking at a run costs: tracking's share of a step, and the CPU time of a set of pictures.

    python -m tests.bench.looking_cost

On one machine without a GPU; MLflow's copy goes to a SQLite file. Times are CPU seconds of the thread that spends them,
so that other work on the machine counts little; the share is that of both threads, as if they never ran side by side.
"""

from __future__ import annotations

import io
import tempfile
import time
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from ilvr_ds.monitoring.memory import MemoryMonitor
from ilvr_ds.monitoring.node_load import NodeMonitor, of_all_ranks
from ilvr_ds.pictures.charts import draw_curves
from ilvr_ds.pictures.selection import draw_latents, draw_selection
from ilvr_ds.pictures.views import SampleView, SegmentView, Selection
from ilvr_ds.tracking.tracker import Tracker, TrackingTarget

INTERVALS, METRICS = 40, 40
STEPS_S = {"demo, 2 CPU ranks, logged every 20 steps": 20 * 0.25, "3B on an H200, logged every 10 steps": 10 * 2.6}
"""Seconds from one logged step to the next: docs/performance.md."""


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        here, beside = tracking(Path(folder))
        print(
            f"tracking, each logged step: {1000 * here:.2f} ms of the training thread, {1000 * beside:.1f} ms beside it"
        )
        for name, seconds in STEPS_S.items():
            print(f"  {name}: {100 * here / seconds:.4f} % and {100 * beside / seconds:.2f} % of a step")
        drawn, empty = pictures(Path(folder)), empty_panels()
        print(f"a set of pictures (3 samples, 7 files): {drawn:.2f} s beside the training thread; that is "
              f"{drawn / empty:.1f} times a figure of nine empty panels ({empty:.2f} s)")  # fmt: skip


def tracking(root: Path) -> tuple[float, float]:
    """CPU seconds of a logged step: of the thread that logs, and of the one that copies to MLflow."""
    tracker = Tracker(root / "run", TrackingTarget(None, "e", "run", root), params={}, tags={})
    memory, node = MemoryMonitor(), NodeMonitor()
    while tracker.run_id is None:  # making the store and the run is done once
        time.sleep(0.1)
    process, own = time.process_time(), time.thread_time()
    for step in range(INTERVALS):
        metrics = {f"loss/{n}": step + n / 7 for n in range(METRICS)}
        tracker.log(step, metrics | of_all_ranks(memory.take(), node.take()))
        time.sleep(0.3)  # as long as the copy takes: each logged step is sent by itself
    own = time.thread_time() - own
    tracker.close("FINISHED")
    return own / INTERVALS, (time.process_time() - process - own) / INTERVALS


def pictures(folder: Path) -> float:
    """CPU seconds of what a run of the demo draws each time."""
    rng = np.random.default_rng(0)
    maps = rng.random((5, 4, 4)).astype(np.float32)
    image = rng.integers(0, 255, (4, 4, 3), dtype=np.uint8).repeat(28, 0).repeat(28, 1)
    cells = tuple(((n, n),) for n in range(4))
    segments = (
        SegmentView("Delete every green shape, first the star.", image, maps[1:], Selection(maps[0], cells)),
    ) * 2
    view = SampleView("held_out-0-0000065", "deletion", "How many remain? A) 1 B) 2 C) 3 D) 4", "B", (image,), segments)
    panels = {name: {f"{name}{n}": (list(range(500)), rng.random(500).tolist()) for n in range(4)} for name in "abcd"}
    draw_latents(view, 0, folder / "first.png")  # reads fonts
    start = time.thread_time()
    for _ in range(3):
        draw_selection(view, 0, folder / "selection.png")
        draw_latents(view, 0, folder / "latents.png")
    draw_curves(panels, folder / "curves.png")
    return time.thread_time() - start


def empty_panels() -> float:
    """CPU seconds of a figure with nothing in it: what the machine makes of matplotlib now."""
    start = time.thread_time()
    for _ in range(3):
        figure = Figure(figsize=(10, 8), dpi=100)
        figure.subplots(3, 3)
        figure.savefig(io.BytesIO(), format="png")
    return (time.thread_time() - start) / 3


if __name__ == "__main__":
    main()
