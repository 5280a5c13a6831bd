"""Records of the authors' format, and how to read them."""

from __future__ import annotations

from pathlib import Path

from ilvr_ds.data.sample import Sample
from ilvr_ds.ingest.importers import Rejected, read_records
from tests.data.packing import write_jsonl

TEXT, LATENT = {"type": "text", "content": "Look."}, {"type": "latent", "helper_image": "b.png"}


def read(root: Path, *records, format="auto") -> list[Sample | Rejected]:
    return list(read_records(write_jsonl(root.parent / "train.jsonl", list(records)), root, format))


def ilvr(**changes) -> dict:
    record = {"text_input": "Why?", "image_input": "a.png", "sequence_plan": [TEXT, LATENT]} | changes
    return {key: value for key, value in record.items() if value is not ...}
