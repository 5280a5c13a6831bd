"""Warns early of targets that teach little: alike across samples, or from pictures in which nothing changed."""

from __future__ import annotations

from typing import Literal

from ilvr_ds import dist

ALIKE = 0.9
"""Targets of different samples with a higher mean cosine hardly tell samples apart."""
INTERVALS = 5
"""Logged intervals in a row."""


class TargetWatch:
    """Reads the metrics of each logged interval; each warning is given once.

    unchanged: `selection.unchanged`.
    """

    def __init__(self, unchanged: Literal["query", "none"] = "query") -> None:
        self.become = "have no target" if unchanged == "none" else "are selected over all patches, by the query"
        self.alike = 0
        """Logged intervals in a row whose targets were alike."""
        self.has_seen_unchanged = False

    def __call__(self, metrics: dict[str, float]) -> None:
        """Warn where these metrics, or those of the last intervals, are suspicious."""
        self.alike = self.alike + 1 if metrics.get("select/target_similarity", 0.0) > ALIKE else 0
        if self.alike == INTERVALS:
            dist.warn(
                "the targets of different samples are alike (select/target_similarity above %g at %d log lines in a "
                "row): latents learn little from them; see selection.pool and docs/design.md",
                ALIKE, INTERVALS,
            )  # fmt: skip
        share = metrics.get("select/unchanged", 0.0)
        if share and not self.has_seen_unchanged:
            self.has_seen_unchanged = True
            dist.warn(
                "in %.1f %% of the segments no part of the helper image differs from the picture before (or there is "
                "none): they %s (select/unchanged)",
                100 * share, self.become,
            )  # fmt: skip
