"""Folders in the layouts of the published data sets, with records of our own making."""

from __future__ import annotations

import base64
import csv
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from tests.data.packing import image_bytes

COUNT = 10
COLOURS = ["red", "blue", "green", "white"]


def letter(number: int, options: int = 4) -> str:
    """The answer of record `number`."""
    return "ABCD"[number % options]


def colours(number: int) -> list[str]:
    """The options of record `number`."""
    return [f"{colour} {number}" for colour in COLOURS]


def _parquet(file: Path, rows: Sequence[dict[str, Any]]) -> None:
    """In row groups of three."""
    file.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(list(rows)), file, row_group_size=3)


def _vstar_text(number: int) -> str:
    listed = "\n".join(f"({name}) {option}" for name, option in zip("ABCD", colours(number), strict=True))
    wish = "Answer with the option's letter from the given choices directly."
    return f"What is the colour of thing {number}?\n{listed}\n{wish}"


def vstar(folder: Path) -> Path:
    """craigwu/vstar_bench: JSON Lines beside folders of pictures."""
    lines = []
    for number in range(COUNT):
        category = ("direct_attributes", "relative_position")[number % 2]
        image = f"{category}/sa_{number}.jpg"
        (folder / category).mkdir(parents=True, exist_ok=True)
        (folder / image).write_bytes(image_bytes(number, "JPEG", (60, 40)))
        lines.append(
            {"image": image, "text": _vstar_text(number), "category": category, "label": letter(number),
             "question_id": number // 2}
        )  # fmt: skip
    (folder / "test_questions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def vstar_parquet(folder: Path) -> Path:
    """lmms-lab/vstar-bench: the same records with their pictures in parquet."""
    rows = [
        {"image": {"bytes": image_bytes(number, "JPEG", (60, 40)), "path": f"{number}.jpg"},
         "text": _vstar_text(number), "category": ("direct_attributes", "relative_position")[number % 2],
         "label": letter(number), "question_id": str(number // 2)}
        for number in range(COUNT)
    ]  # fmt: skip
    _parquet(folder / "data/test-00000-of-00001.parquet", rows)
    return folder


def mmvp(folder: Path) -> Path:
    """MMVP/MMVP: a table beside numbered pictures."""
    (folder / "MMVP Images").mkdir(parents=True)
    with (folder / "Questions.csv").open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["Index", "Question", "Options", "Correct Answer"])
        for number in range(1, COUNT + 1):
            (folder / f"MMVP Images/{number}.jpg").write_bytes(image_bytes(number, "JPEG", (60, 40)))
            question = f"Is thing {(number + 1) // 2} open, or closed?"
            table.writerow([number, question, "(a) Open (b) Closed", f"({letter(number, 2).lower()})"])
    return folder


def blink(folder: Path) -> Path:
    """BLINK-Benchmark/BLINK: a folder for each task, one to four pictures a record."""
    for task in ("Counting", "Art_Style"):
        rows = []
        for number in range(COUNT // 2):
            images = {
                f"image_{place}": {"bytes": image_bytes(10 * number + place), "path": None}
                if place <= (1 if task == "Counting" else 3)
                else None
                for place in range(1, 5)
            }
            rows.append(
                {"idx": f"val_{task}_{number}", "question": "How many?", "sub_task": task, **images,
                 "choices": ["0", "1", "2"], "answer": f"({letter(number, 3)})",
                 "prompt": f"How many in {number}?\nSelect from the following choices.\n(A) 0\n(B) 1\n(C) 2",
                 "explanation": ""}
            )  # fmt: skip
        _parquet(folder / task / "val-00000-of-00001.parquet", rows)
        _parquet(folder / task / "test-00000-of-00001.parquet", [rows[0] | {"answer": "hidden"}])
    return folder


def hrbench(folder: Path) -> Path:
    """DreamMr/HR-Bench: two sizes, each question with its options in turns, pictures in base64."""
    for size in ("4k", "8k"):
        rows = [
            {"index": number, "image": base64.b64encode(image_bytes(number, "JPEG", (60, 40))).decode(),
             "question": f"What is the colour of thing {number // 4}?",
             **dict(zip("ABCD", colours(number), strict=True)), "answer": letter(number),
             "category": ("single", "cross")[number // 4 % 2], "cycle_category": f"cycle_{number % 4}"}
            for number in range(8)
        ]  # fmt: skip
        _parquet(folder / f"hr_bench_{size}.parquet", rows)
    return folder


def mme_realworld_lite(folder: Path) -> Path:
    """yifanzhang114/MME-RealWorld-lite-lmms-eval: pictures in base64, five options with their letters."""
    rows = [
        {"index": f"perception/{number}", "bytes": base64.b64encode(image_bytes(number)).decode(),
         "question": f"What is the colour of thing {number}?",
         "multi-choice options": [
             *(f"({name}) {option}" for name, option in zip("ABCD", colours(number), strict=True)),
             "(E) The image does not feature it.",
         ],
         "answer": letter(number), "category": ("Perception/Monitoring", "Reasoning/Autonomous_Driving")[number % 2],
         "l2-category": "color"}
        for number in range(COUNT)
    ]  # fmt: skip
    _parquet(folder / "data/train-00000-of-00002.parquet", rows[:6])
    _parquet(folder / "data/train-00001-of-00002.parquet", rows[6:])
    return folder


COPIES = {
    "vstar": vstar,
    "mmvp": mmvp,
    "blink": blink,
    "hrbench": hrbench,
    "mme-realworld-lite": mme_realworld_lite,
}
