"""Finished evaluations, read from their folders again."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ilvr_ds.errors import UserError

SCORES, SAMPLES = "scores.json", "samples.jsonl"
_KEYS = ("model", "data", "benchmark", "latent_size")


@dataclass(frozen=True)
class Finished:
    """One evaluation: one model on one benchmark."""

    folder: Path
    settings: dict[str, Any]
    rules: dict[str, dict[str, Any]]
    """What scores.json says of each rule set; the first is the main one."""
    verdicts: dict[str, dict[int, bool]]
    """Of each rule set, by the number of the sample in the data set."""

    @property
    def has_latents(self) -> bool:
        """Whether the model knows latent tokens."""
        return bool(self.settings["latent_size"] > 0)

    @property
    def model(self) -> str:
        """The model as people know it, and the mode in which it answered where that is not its own."""
        path, here = Path(self.settings["model"]), Path.cwd()
        name = str(path.relative_to(here) if path.is_relative_to(here) else path)
        mode = self.settings.get("mode")
        return f"{name} ({mode})" if mode else name


def evaluations_in(folder: Path) -> list[Path]:
    """The folder itself where an evaluation lies in it, else those that `evaluate` put into a model's folder."""
    if (folder / SCORES).is_file():
        return [folder]
    return sorted(file.parent for file in folder.glob(f"evaluation/*/{SCORES}"))


def read_finished(folder: Path) -> Finished:
    """Read what `evaluate` wrote. Raises UserError where it cannot be read, or its rules have no version."""
    try:
        scores = json.loads((folder / SCORES).read_text())
        lines = [json.loads(line) for line in (folder / SAMPLES).read_text().splitlines()]
        settings, rules = scores["settings"], scores["rules"]
        _ = [settings[key] for key in _KEYS]
        verdicts = {rule: {line["number"]: bool(line["verdicts"][rule]) for line in lines} for rule in rules}
    except OSError as error:
        raise UserError(f"{error.filename}: cannot be read ({error.strerror})") from error
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{folder}: is not what `ilvr-ds evaluate` writes ({error!r})") from error
    for rule, part in rules.items():
        if "version" not in part:
            today = "option-letter" if rule == "comt-official" else f"{rule} with a version"
            raise UserError(
                f"{folder}: judged by rules from before they had versions (what was called {rule} is {today} now); "
                "start the same evaluation again: it judges anew, and answers nothing twice"
            )
    return Finished(folder, settings, rules, verdicts)
