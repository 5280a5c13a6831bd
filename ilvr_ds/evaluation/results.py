"""Results on disk: lines of finished samples that survive a kill, and what is made of them at the end.

settings.json               what was evaluated and how; a later start must have the same
part-00000.jsonl            lines of finished samples as rank 0 wrote them
samples.jsonl               all of them in the data set's order, written at the end
predictions.jsonl           {"id", "response"} for the benchmark's own script
scores.json                 written last: where it stands, the evaluation is whole
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TextIO

from ilvr_ds.errors import UserError
from ilvr_ds.whole_files import cut_torn_line, write_whole

Line = dict[str, Any]


class Results:
    """The output folder of one evaluation; `stem` begins the names of the parts."""

    def __init__(self, folder: Path, stem: str = "part") -> None:
        self.folder = folder
        self.stem = stem

    def open(self, settings: Mapping[str, Any]) -> None:
        """Start or go on (main rank): checks that the settings are those of before, and cuts torn last lines off."""
        file = self.folder / "settings.json"
        wanted = json.loads(json.dumps(settings))
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            if file.exists():
                before = json.loads(file.read_text())
                if changed := sorted(key for key in wanted | before if wanted.get(key) != before.get(key)):
                    raise UserError(
                        f"{self.folder}: holds an evaluation with another {', '.join(changed)}; give another --output"
                    )
            elif any(self.folder.glob(f"{self.stem}-*.jsonl")):
                raise UserError(f"{file}: is missing beside results; give another --output")
            else:
                write_whole(file, json.dumps(wanted, indent=1))
            for part in self.folder.glob(f"{self.stem}-*.jsonl"):
                cut_torn_line(part)  # its sample is answered again
        except OSError as error:
            raise UserError(f"--output: cannot write to {self.folder} ({error.strerror})") from error

    def lines(self) -> list[Line]:
        """Finished samples in the data set's order, each once."""
        lines = {}
        for part in sorted(self.folder.glob(f"{self.stem}-*.jsonl")):
            for text in part.read_text().splitlines():
                line = json.loads(text)
                lines[line["number"]] = line
        return [lines[number] for number in sorted(lines)]

    def part(self, rank: int) -> TextIO:
        """The file to which this rank appends."""
        return (self.folder / f"{self.stem}-{rank:05d}.jsonl").open("a")

    def finish(self, lines: Iterable[Line], scores: Mapping[str, Any]) -> None:
        """Write the files that people read (main rank)."""
        lines = list(lines)
        predictions = [{"id": line["id"], "response": line["response"]} for line in lines]
        write_whole(self.folder / "samples.jsonl", "".join(json.dumps(line) + "\n" for line in lines))
        write_whole(self.folder / "predictions.jsonl", "".join(json.dumps(line) + "\n" for line in predictions))
        write_whole(self.folder / "scores.json", json.dumps(scores, indent=1) + "\n")


def append(file: TextIO, lines: Iterable[Line]) -> None:
    """Whole lines, in the system's hands when this returns."""
    file.write("".join(json.dumps(line) + "\n" for line in lines))
    file.flush()
