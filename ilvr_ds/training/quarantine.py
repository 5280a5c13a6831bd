"""Bad samples, which stand-ins replace: counted, listed in a file; too many of them end the run.

After each step every rank learns the bad samples of all ranks, so that all decide alike. The main rank
writes `quarantine.jsonl` in the run's folder: one line for each sample, also when a run is started again.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ilvr_ds import dist
from ilvr_ds.config import Recipe
from ilvr_ds.data.shards import ShardSet
from ilvr_ds.data.window import BadSample
from ilvr_ds.errors import UserError
from ilvr_ds.tracking.record import Lines, read_record

logger = logging.getLogger("ilvr_ds")

FILE = "quarantine.jsonl"
JUDGED = 1000
"""`data.max_bad_fraction` is judged over this many recent samples, or over a smaller data set."""
EACH_ALONE = 1
"""In place of JUDGED: each call of `add` is judged by itself, as for evaluations, which have the same samples again."""
SHOWN = 20
"""Bad samples that are also shown in the log."""


class Quarantine:
    """The bad samples of one data set during a run."""

    def __init__(
        self,
        directory: Path,
        shards: ShardSet,
        max_fraction: float,
        is_writer: bool,
        name: str = "",
        judged: int = JUDGED,
    ) -> None:
        self.path = directory / FILE
        self.max_fraction = max_fraction
        self.name = name
        """Of the data set in a mixture."""
        self.skipped = 0
        """Samples replaced so far, on all ranks; one that is met again counts again."""
        self.retries = 0
        """Reads tried again so far, on all ranks."""
        self._location, self._fingerprint = shards.location, shards.fingerprint
        self._judged = min(judged, len(shards))
        self._recent: deque[tuple[int, int]] = deque()  # (bad, all) of the last steps
        self._last: BadSample | None = None
        self._lines = Lines(self.path) if is_writer else None
        self._listed = self._read() if is_writer else set()

    @staticmethod
    def of(recipe: Recipe, shards: ShardSet, name: str = "", judged: int = JUDGED) -> Quarantine:
        """The quarantine of a run's data set; the main rank writes its file."""
        return Quarantine(recipe.run_dir, shards, recipe.data.max_bad_fraction, dist.is_main(), name, judged)

    def add(self, bad: Sequence[BadSample], samples: int, retries: int) -> None:
        """What happened on all ranks in one step of `samples` samples; must be the same call on every rank."""
        self.skipped += len(bad)
        self.retries += retries
        self._recent.append((len(bad), samples))
        while sum(n for _, n in self._recent) - self._recent[0][1] >= self._judged:
            self._recent.popleft()
        for sample in bad:
            self._last = sample
            if self._lines and sample.number not in self._listed:
                self._write(self._lines, sample)
        if self._lines and not bad:
            self._lines.retry()

    @property
    def exceeded(self) -> bool:
        """More than `max_fraction` of the recent samples were bad."""
        return self._recent_bad > self.max_fraction * self._out_of

    def check(self) -> None:
        """Raise UserError where the fraction is exceeded; on all ranks or on none."""
        if self.exceeded:
            assert self._last is not None
            raise UserError(
                f"data.max_bad_fraction: {self._recent_bad} of the last {sum(n for _, n in self._recent)} samples of "
                f"{self._location} could not be used, more than {self.max_fraction:g} of {self._out_of}; "
                f"all are listed in {self.path}, the last: {self._last.reason}"
            )

    def metrics(self) -> dict[str, float]:
        """Totals since the start of the run."""
        return {"data/skipped": float(self.skipped), "data/retries": float(self.retries)}

    def state_dict(self) -> dict[str, int]:
        """The totals, for a checkpoint."""
        return {"skipped": self.skipped, "retries": self.retries}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on from the totals of a checkpoint."""
        self.skipped, self.retries = state["skipped"], state["retries"]

    def close(self) -> None:
        """Write what a full disk left to write, or say how much it is."""
        if self._lines:
            self._lines.close()

    @property
    def _out_of(self) -> int:
        """Of how many samples `max_fraction` is taken: the recent ones, or more where there were few yet."""
        return max(sum(n for _, n in self._recent), self._judged)

    @property
    def _recent_bad(self) -> int:
        return sum(bad for bad, _ in self._recent)

    def _read(self) -> set[int]:
        """Numbers of this data set's samples that an earlier start of the run has listed."""
        if not self.path.exists():
            return set()
        return {line["number"] for line, _ in read_record(self.path) if line["data"] == self._fingerprint}

    def _write(self, lines: Lines, sample: BadSample) -> None:
        self._listed.add(sample.number)
        line: dict[str, Any] = {**asdict(sample), "data": self._fingerprint, "location": self._location}
        lines.append({**line, **({"set": self.name} if self.name else {}), "time": time.time()})
        of = f" of {self.name}" if self.name else ""
        if len(self._listed) <= SHOWN:
            logger.warning("sample %d%s is replaced by a stand-in: %s", sample.number, of, sample.reason)
        elif len(self._listed) == SHOWN + 1:
            logger.warning("more samples%s are replaced by stand-ins; all are listed in %s", of, self.path)
