"""Records of the authors' format, and how to read them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from ilvr_ds.data.sample import Sample, TextStep
from ilvr_ds.ingest.containers.opening import open_source
from ilvr_ds.ingest.importers import Format, Importer, Rejected, check_request
from tests.data.packing import write_jsonl

TEXT, LATENT = {"type": "text", "content": "Look."}, {"type": "latent", "helper_image": "b.png"}


def read_records(path: Path, image_root: Path, format: Format = "auto") -> Iterator[Sample | Rejected]:
    """The records of a file or folder in their order, as `pack` reads them."""
    check_request(image_root, format)
    return (record for _, record in Importer(open_source(path), image_root, format))


def read(root: Path, *records, format="auto") -> list[Sample | Rejected]:
    return list(read_records(write_jsonl(root.parent / "train.jsonl", list(records)), root, format))


def ilvr(**changes) -> dict:
    record = {"text_input": "Why?", "image_input": "a.png", "sequence_plan": [TEXT, LATENT]} | changes
    return {key: value for key, value in record.items() if value is not ...}


def read_twenty(root: Path, good: list[dict], broken: list[tuple[dict, str]]) -> list[Sample]:
    """The samples of at least 15 good records, among which at least 5 broken ones lie.

    Checks that the broken ones are rejected with their line and reason, and that nothing else is.
    """
    assert len(good) >= 15 and len(broken) >= 5
    records = [good[0], *(record for record, _ in broken), *good[1:]]
    found = read(root, *records)
    rejected = [item for item in found if isinstance(item, Rejected)]
    assert [item.line for item in rejected] == list(range(2, 2 + len(broken))), rejected
    for item, (_, reason) in zip(rejected, broken, strict=True):
        assert reason in item.reason, (reason, item.reason)
        assert "\n" not in item.reason
    return [item for item in found if isinstance(item, Sample)]


def shapes(sample: Sample) -> list[str | int]:
    """The steps: texts, and the numbers of helper images."""
    return [step.content if isinstance(step, TextStep) else step.helper for step in sample.steps]
