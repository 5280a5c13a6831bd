"""Charts: the curves of a run, accuracy by kind of task, the effect of replaced latents on accuracy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from ilvr_ds.pictures.style import COLOURS, LINES, NORMAL, SMALL, new_figure, place, save

Series = Mapping[str, tuple[Sequence[int], Sequence[float]]]
"""Steps and values by name."""


def draw_curves(panels: Mapping[str, Series], path: Path) -> None:
    """One panel per entry: lines over optimizer steps, and beside them each line's name and last value."""
    heights = [max(1.9, 0.16 * len(series) + 0.6) for series in panels.values()]
    total = sum(heights)
    figure = new_figure(total)
    last = max((steps[-1] for series in panels.values() for steps, _ in series.values()), default=1)
    top = total
    for (title, series), height in zip(panels.items(), heights, strict=True):
        axes = figure.add_axes((0.055, (top - height + 0.42) / total, 0.66, (height - 0.72) / total))
        for number, (name, (steps, values)) in enumerate(series.items()):
            style, colour = LINES[number // len(COLOURS) % len(LINES)], COLOURS[number % len(COLOURS)]
            marker = "o" if len(steps) < 3 else None
            label = f"{name} {values[-1]:.3g}"
            axes.plot(steps, values, style, color=colour, label=label, linewidth=1.6, marker=marker, markersize=5)
        _label(axes, title, "optimizer step", "")
        axes.set_xlim(0, 1.01 * last)
        axes.legend(fontsize=SMALL, frameon=False, loc="upper left", bbox_to_anchor=(1.01, 1.05), borderaxespad=0)
        top -= height
    save(figure, path)


@dataclass(frozen=True)
class Bar:
    """A group's accuracy with its 95 % interval, its number of samples, and the accuracy of guessing, if known.

    Ends of the interval that are nan are not drawn.
    """

    name: str
    accuracy: float
    low: float
    high: float
    samples: int | None
    chance: float | None


def draw_accuracy(title: str, bars: Sequence[Bar], path: Path) -> None:
    """Accuracy of each kind of task with its 95 % interval, chance as a line across its bar."""
    is_crowded = len(bars) > 8
    figure = new_figure(4.4 if is_crowded else 3.6)
    axes = figure.subplots()
    place(figure, 0.7, 0.15, 0.35, 1.4 if is_crowded else 0.6)
    places = np.arange(len(bars))
    accuracy = np.array([bar.accuracy for bar in bars])
    spread = np.abs(np.array([[bar.low for bar in bars], [bar.high for bar in bars]]) - accuracy)
    axes.bar(places, accuracy, 0.6, color=COLOURS[5], yerr=spread, capsize=4, ecolor="#444444", label="accuracy")
    known = [(x, bar.chance) for x, bar in zip(places, bars, strict=True) if bar.chance is not None]
    for number, (x, chance) in enumerate(known):
        label = "chance" if number == 0 else ""
        axes.hlines(chance, x - 0.4, x + 0.4, colors=COLOURS[3], linestyles="--", linewidth=2.2, label=label)
    for x, bar in zip(places, bars, strict=True):
        axes.text(float(x), 0.01, f"{bar.accuracy:.2f}", ha="center", va="bottom", fontsize=NORMAL)
    tilt: dict[str, Any] = {"rotation": 35, "ha": "right", "rotation_mode": "anchor"} if is_crowded else {}
    gap = ", " if is_crowded else "\n"
    names = [bar.name if bar.samples is None else f"{bar.name}{gap}n = {bar.samples}" for bar in bars]
    axes.set_xticks(places, names, fontsize=SMALL, **tilt)
    axes.set_ylim(0, 1)
    _label(axes, title, "", "accuracy")
    axes.legend(fontsize=SMALL, frameon=False, loc="lower right", bbox_to_anchor=(1, 1), ncols=2, borderaxespad=0.1)
    save(figure, path)


@dataclass(frozen=True)
class AblationBar:
    """A condition's accuracy, its difference from that with the model's own latents on the same samples, and the 95 %
    interval of the difference."""

    name: str
    accuracy: float
    difference: float
    low: float
    high: float


def draw_ablation(title: str, own: float, bars: Sequence[AblationBar], path: Path) -> None:
    """Each condition's difference in accuracy from the model's own latents, with its 95 % interval.

    own: accuracy with these on all samples; a condition may have been tried on some of them.
    """
    figure = new_figure(0.45 * len(bars) + 1.4)
    axes = figure.subplots()
    place(figure, 2.2, 0.3, 0.35, 0.6)
    places = np.arange(len(bars))
    difference = np.array([bar.difference for bar in bars])
    spread = np.array([[bar.difference - bar.low for bar in bars], [bar.high - bar.difference for bar in bars]])
    spread[np.abs(spread) < 1e-9] = 0  # an end at the difference itself may lie an ulp beyond it
    axes.errorbar(
        difference, places, xerr=spread, fmt="o", color=COLOURS[0], ecolor=COLOURS[0], capsize=4, markersize=7
    )
    axes.axvline(0, color=COLOURS[3], linestyle="--", linewidth=1.6)
    axes.set_yticks(places, [f"{bar.name.replace('_', ' ')} ({bar.accuracy:.2f})" for bar in bars], fontsize=NORMAL)
    axes.set_ylim(len(bars) - 0.5, -0.5)
    text = f"accuracy minus that with own latents on the same samples (on all: {own:.2f}); bars: 95 % interval"
    _label(axes, title, text, "latents replaced by")
    save(figure, path)


def _label(axes: Axes, title: str, x: str, y: str) -> None:
    axes.set_title(title, fontsize=NORMAL, loc="left", parse_math=False)
    axes.set_xlabel(x, fontsize=SMALL)
    axes.set_ylabel(y, fontsize=SMALL)
    axes.tick_params(labelsize=SMALL)
    axes.grid(axis="both", color="#DDDDDD", linewidth=0.6)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
