"""A file of questions, in any format that `pack` reads, answered many at a time."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ilvr_ds.data.sample import Sample, SampleError
from ilvr_ds.data.template import EncodedSample
from ilvr_ds.errors import UserError
from ilvr_ds.evaluation.examples import marked_text
from ilvr_ds.generation.generate import Generator, in_order
from ilvr_ds.generation.loading import Reasoner
from ilvr_ds.generation.settings import GenerationSettings
from ilvr_ds.ingest.containers.opening import open_source
from ilvr_ds.ingest.importers import Format, Importer, Rejected, check_request
from ilvr_ds.whole_files import whole_file


class Questions:
    """The questions of a file; what else its records hold (plans, helper images, answers) is read and not used."""

    def __init__(self, path: Path, image_root: Path, format: Format = "auto") -> None:
        self.path, self.image_root, self.format = path, image_root, format
        check_request(image_root, format)

    def __iter__(self) -> Iterator[tuple[str, Sample]]:
        """Where each stands, and what it is. Raises UserError with file and line for one that cannot be asked."""
        source = open_source(self.path)
        for number, record in Importer(source, self.image_root, self.format):
            where = f"{self.path}: {source.unit} {number}"
            if isinstance(record, Rejected):
                raise UserError(f"{where}: {record.reason}")
            yield where, record


def check_questions(reasoner: Reasoner, questions: Questions) -> int:
    """How many there are. Raises UserError where one does not fit the model, or there is none.

    The file is read for this alone, so that a mistake in its last line shows before the first answer.
    """
    count = 0
    for count, (where, sample) in enumerate(questions, start=1):  # noqa: B007
        try:
            reasoner.encoder.prompt(sample)
        except SampleError as error:
            raise UserError(f"{where}: {error}") from error
    if not count:
        raise UserError(f"{questions.path}: holds no question")
    return count


def answers(
    reasoner: Reasoner, settings: GenerationSettings, questions: Questions, batch_size: int
) -> Iterator[dict[str, Any]]:
    """For each question, in order, its id and text, the response, and the response with its latent segments marked."""
    asked: list[tuple[str, str]] = []

    def prompts() -> Iterator[EncodedSample]:
        for _, sample in questions:
            asked.append((sample.id, sample.question))
            yield reasoner.encoder.prompt(sample)

    for number, answer in in_order(Generator(reasoner, settings).stream(prompts(), batch_size)):
        yield {
            "id": asked[number][0],
            "question": asked[number][1],
            "response": answer.text,
            "marked": marked_text(reasoner, answer),
            "steps": list(answer.steps),
            "hit_limit": answer.hit_limit,
        }


def json_line(line: dict[str, Any]) -> str:
    """As JSON Lines have it."""
    return json.dumps(line, ensure_ascii=False)


def check_output(path: Path) -> None:
    """Raise UserError where something would be overwritten."""
    if path.exists():
        raise UserError(f"--output {path}: exists already; give another name, or remove it")


def write_answers(lines: Iterator[dict[str, Any]], path: Path) -> None:
    """Write all of them, or nothing. Raises UserError where that is impossible."""
    try:
        with whole_file(path) as partial, partial.open("w", encoding="utf-8") as file:
            file.writelines(json_line(line) + "\n" for line in lines)
    except OSError as error:
        raise UserError(f"--output {path}: cannot be written ({error.strerror})") from error
