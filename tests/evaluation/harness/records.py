"""Ten self-made questions as a task of each harness: about trails for lmms-eval, about squares for VLMEvalKit."""

from __future__ import annotations

import base64
import csv
import json
from itertools import islice
from pathlib import Path

from ilvr_ds.demo.material import TRAINED_ON
from ilvr_ds.demo.task import draw_samples
from tests.data.packing import image_bytes

COLOURS = ["red", "blue", "green", "white"]
QUESTION = "What is the colour of the square?"
PROMPT = f"{QUESTION}\nA. red\nB. blue\nC. green\nD. white\nAnswer with the option's letter directly."
COUNT = 10
_TASK = """\
task: trails
dataset_path: json
dataset_kwargs:
  data_files:
    test: {file}
test_split: test
output_type: generate_until
doc_to_visual: !function trails.pictures
doc_to_text: "{{{{prompt}}}}"
doc_to_target: "{{{{answer}}}}"
process_results: !function trails.judge
generation_kwargs:
  max_new_tokens: 60
  do_sample: false
metric_list:
  - metric: right
    aggregation: mean
    higher_is_better: true
"""
_FUNCTIONS = """\
from PIL import Image


def pictures(doc):
    return [Image.open(doc["image"]).convert("RGB")]


def judge(doc, results):
    return {"right": float(f"The final answer is: {doc['answer']})" in results[0])}
"""


def write_lmms_eval_task(folder: Path) -> None:
    """A task `trails` in the form that `--include_path` takes: what the trained model of the demo follows."""
    folder.mkdir(parents=True)
    records = []
    for number, sample in enumerate(islice(draw_samples(TRAINED_ON, 0, "held_out", COUNT), COUNT)):
        (folder / f"{number}.png").write_bytes(sample.input_images[0])
        records.append({"image": str(folder / f"{number}.png"), "prompt": sample.question, "answer": sample.answer})
    (folder / "trails.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    (folder / "trails.yaml").write_text(_TASK.format(file=folder / "trails.jsonl"))
    (folder / "trails.py").write_text(_FUNCTIONS)


def write_vlmevalkit_table(file: Path) -> None:
    """The same as a table of VLMEvalKit's: pictures in base64, a column for each option."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("w", newline="") as opened:
        table = csv.writer(opened, delimiter="\t")
        table.writerow(["index", "image", "question", *"ABCD", "answer", "category"])
        for number in range(COUNT):
            picture = base64.b64encode(image_bytes(20 * number, size=(60, 40))).decode()
            table.writerow([number, picture, QUESTION, *COLOURS, "ABCD"[number % 4], ("even", "odd")[number % 2]])
