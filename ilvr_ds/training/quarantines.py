"""The quarantines of all data sets of a mixture, as one: too many bad samples of any set end the run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from ilvr_ds.config import Recipe
from ilvr_ds.data.mixture import Mixture
from ilvr_ds.data.window import BadSample
from ilvr_ds.tracking.names import metric_name
from ilvr_ds.training.quarantine import JUDGED, Quarantine


class Quarantines:
    """Deals bad samples, numbered through the mixture, to the quarantine of their set, numbered there."""

    def __init__(self, mixture: Mixture, parts: Sequence[Quarantine]) -> None:
        self.mixture = mixture
        self.parts = parts

    @staticmethod
    def of(recipe: Recipe, mixture: Mixture, judged: int = JUDGED) -> Quarantines:
        """Those of a run's data; the main rank writes their file. judged: as in quarantine.py."""
        pairs = zip(mixture.sets, mixture.names, strict=True)
        return Quarantines(mixture, [Quarantine.of(recipe, shards, name, judged) for shards, name in pairs])

    def add(self, bad: Sequence[BadSample], samples: Sequence[int], retries: int) -> None:
        """What happened on all ranks in one step; must be the same call on every rank.

        samples [sets]: how many of each set the step had.
        """
        by_set: list[list[BadSample]] = [[] for _ in self.parts]
        for sample in bad:
            which, number = self.mixture.find(sample.number)
            by_set[which].append(replace(sample, number=number))
        for part, found, count in zip(self.parts, by_set, samples, strict=True):
            part.add(found, count, retries if part is self.parts[0] else 0)  # of which set is not known

    @property
    def skipped(self) -> int:
        """Samples replaced so far, on all ranks; one that is met again counts again."""
        return sum(part.skipped for part in self.parts)

    @property
    def exceeded(self) -> bool:
        """More than `max_fraction` of the recent samples of a set were bad."""
        return any(part.exceeded for part in self.parts)

    @property
    def max_fraction(self) -> float:
        """`data.max_bad_fraction`."""
        return self.parts[0].max_fraction

    def check(self) -> None:
        """Raise UserError where the fraction is exceeded; on all ranks or on none."""
        for part in self.parts:
            part.check()

    def metrics(self) -> dict[str, float]:
        """Totals since the start of the run, in a mixture also of each set."""
        by_set = {
            metric_name("data/skipped_by_set", name): float(part.skipped)
            for name, part in zip(self.mixture.names, self.parts, strict=True)
            if name
        }
        retries = sum(part.retries for part in self.parts)
        return {"data/skipped": float(self.skipped), "data/retries": float(retries)} | by_set

    def state_dict(self) -> dict[str, Any]:
        """The totals, for a checkpoint."""
        if len(self.parts) == 1:
            return self.parts[0].state_dict()
        return {"sets": [part.state_dict() for part in self.parts]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from the totals of a checkpoint."""
        for part, saved in zip(self.parts, state.get("sets", [state]), strict=True):
            part.load_state_dict(saved)

    def close(self) -> None:
        """Write what a full disk left to write, or say how much it is."""
        for part in self.parts:
            part.close()
