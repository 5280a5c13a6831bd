"""lmms-eval and VLMEvalKit themselves, each in an environment of its own: they score models with latents.

The environments borrow torch and transformers of this one, and have our package installed as a user has it.
"""

from __future__ import annotations

import csv
import json
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from ilvr_ds.demo.material import TRAINED, TRAINED_ON
from ilvr_ds.evaluation.published import letters
from tests.evaluation.environment import borrowing_environment, pip_install
from tests.evaluation.harness import records
from tests.evaluation.harness.replies import OPTIONS, draw_replies
from tests.evaluation.latent_model import build_latent_model
from tests.ranks import ROOT

pytestmark = [pytest.mark.drill, pytest.mark.timeout(1500)]
SOURCES = ("ilvr_ds", "csrc", "launch", "ds_configs", "setup.py", "pyproject.toml", "README.md", "LICENSE")
LMMS_EVAL = (
    "lmms-eval==0.7.3",
    ("loguru", "sacrebleu", "evaluate", "datasets", "tenacity", "pytablewriter", "pytz", "filelock<3.21"),
)
"""The harness, and what of its fifty dependencies it imports to evaluate."""
VLMEVALKIT = (
    "ms-vlmeval==0.0.20",
    (
        "tabulate", "termcolor", "validators", "sty", "openai", "portalocker", "timeout-decorator", "decord", "jieba",
        "Levenshtein", "nltk", "rouge", "math-verify", "pylatexenc", "opencv-python-headless", "imageio",
        "json-repair", "num2words", "qwen-vl-utils",
    ),
)  # fmt: skip
"""ModelScope's package of VLMEvalKit, which has no package of its own; it imports all its data sets at once."""
DECLARED = """\
import torch

for name in ("nms", "qnms"):
    torch.library.define(f"torchvision::{name}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
"""
"""PyPI's torchvision is built for CUDA's torch: beside another it lacks its operators, and cannot be imported."""


class Environment:
    """With a harness, and our package."""

    def __init__(self, folder: Path, harness: str, needs: tuple[str, ...]) -> None:
        self.bin = borrowing_environment(folder / "venv")
        self._pip("--no-deps", harness, may_skip=True)
        self._pip(*needs)
        if "vlmeval" in harness:
            self._pip("--no-deps", "torchvision")
            if "+cpu" in _version("torch"):
                packages = next((folder / "venv/lib").glob("python*/site-packages"))
                (packages / "sitecustomize.py").write_text(DECLARED)
        for name in SOURCES:
            copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
            (folder / "source").mkdir(exist_ok=True)
            copy(ROOT / name, folder / "source" / name)
        self._pip("--no-deps", "--no-build-isolation", str(folder / "source"))

    def _pip(self, *packages: str, may_skip: bool = False) -> None:
        done = pip_install(self.bin, *packages, env=self._environment())
        if done.returncode and may_skip:
            pytest.skip(f"PyPI cannot be reached: {done.stderr.strip().splitlines()[-1]}")
        assert done.returncode == 0, done.stderr

    @staticmethod
    def _environment(**more: str) -> dict[str, str]:
        """Without our own paths, and without a network for data sets."""
        offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "DS_ACCELERATOR": "cpu"}
        return {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | offline | more

    def __call__(self, folder: Path, *command: str | Path, said: str | None = None, **more: str) -> str:
        """What a command of the environment prints."""
        done = subprocess.run(
            [str(self.bin / command[0]), *map(str, command[1:])], cwd=folder, env=self._environment(**more), input=said,
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        return done.stdout + done.stderr

    def letters(self, script: str, asked: Any, folder: Path) -> Any:
        """What a script of this folder prints after "letters: "."""
        said = self(folder, "python", Path(__file__).parent / script, said=json.dumps(asked))
        return json.loads(said.partition("letters: ")[2].splitlines()[0])


def _version(package: str) -> str:
    from importlib.metadata import version

    return version(package)


@pytest.fixture(scope="module")
def lmms_eval(tmp_path_factory: pytest.TempPathFactory) -> Environment:
    return Environment(tmp_path_factory.mktemp("lmms-eval"), *LMMS_EVAL)


@pytest.fixture(scope="module")
def vlmevalkit(tmp_path_factory: pytest.TempPathFactory) -> Environment:
    return Environment(tmp_path_factory.mktemp("vlmevalkit"), *VLMEVALKIT)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_latent_model(tmp_path_factory.mktemp("latent") / "model", records.PROMPT)


def test_lmms_eval_prints_the_score_of_the_trained_model(lmms_eval: Environment, tmp_path: Path) -> None:
    """Which is right in all ten, and only by its latents (tests/demo/test_material.py)."""
    records.write_lmms_eval_task(tmp_path / "task")
    said = lmms_eval(
        tmp_path, "lmms-eval", "--model", "ilvr_ds", "--tasks", "trails", "--include_path", tmp_path / "task",
        "--model_args", f"pretrained={TRAINED},max_new_tokens=60,precision=fp32", "--batch_size", "4",
        "--output_path", "out", "--log_samples", HF_HOME=str(tmp_path / "hf"),
    )  # fmt: skip
    score = re.search(r"\|trails\s*\|none.*\|right\s*\|[^|]*\|\s*([\d.]+)\|", said)
    [file] = (tmp_path / "out").rglob("*_samples_trails.jsonl")
    samples = [json.loads(line) for line in file.read_text().splitlines()]
    assert score and float(score[1]) == 1 and [sample["right"] for sample in samples] == [1] * records.COUNT
    counts = [sample["token_counts"][0] for sample in samples]
    assert all(count["reasoning_tokens"] == TRAINED_ON.signs for count in counts)


def test_our_rules_find_the_letters_that_lmms_eval_finds(lmms_eval: Environment, tmp_path: Path) -> None:
    replies = draw_replies(1000)
    rules = {
        "vstar": letters.vstar,
        "mmvp": letters.mmvp,
        "blink": letters.blink,
        "mme-realworld-lite": letters.mme_realworld,
    }
    theirs = lmms_eval.letters("lmms_eval_letters.py", replies, tmp_path)
    for name, rule in rules.items():
        ours = [rule(reply, list(OPTIONS.values())) for reply in replies]
        differing = [
            (reply, mine, other)
            for reply, mine, other in zip(replies, ours, theirs[name], strict=True)
            if mine != other
        ]
        assert differing == [], name


def test_vlmevalkit_prints_a_score_of_a_model_with_latents(
    vlmevalkit: Environment, model: Path, tmp_path: Path
) -> None:
    """PRED_FORMAT: what a random model says, a spreadsheet cannot hold."""
    records.write_vlmevalkit_table(tmp_path / "data/squares.tsv")
    arguments = {"class": "ILVR", "model": str(model), "max_new_tokens": 12, "precision": "fp32"}
    data = {"class": "CustomMCQDataset", "dataset": "squares"}
    config = {"model": {"tiny": arguments}, "data": {"squares": data}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    said = vlmevalkit(
        tmp_path, "python", "-m", "ilvr_ds.evaluation.harness.vlmevalkit", "--config", "config.json",
        "--judge", "exact_matching", "--work-dir", "out", LMUData=str(tmp_path / "data"), PRED_FORMAT="tsv",
    )  # fmt: skip
    score = re.search(r"squares\s+0\.00% \(0/10\)\s+0\.00% \(0/10\)\s+split=none\|Overall\s+([\d.]+)", said)
    with next((tmp_path / "out").rglob("tiny_squares.tsv")).open(newline="") as file:
        answered = list(csv.DictReader(file, delimiter="\t"))
    right = [letters.exact_matching(row["prediction"], records.COLOURS) == row["answer"] for row in answered]
    assert len(right) == records.COUNT and score and float(score[1]) == sum(right) / records.COUNT
    assert f"{records.COUNT} of {records.COUNT} answers used latents" in said


def test_our_rule_finds_the_letters_that_vlmevalkit_finds(vlmevalkit: Environment, tmp_path: Path) -> None:
    """But for letters after "answer is", which VLMEvalKit reads since August 2026 and this package does not yet."""
    replies = [reply for reply in draw_replies(1500) if not letters._ANSWER_IS.search(reply)]
    assert len(replies) > 1000
    theirs = vlmevalkit.letters("vlmevalkit_letters.py", {"replies": replies, "options": OPTIONS}, tmp_path)
    ours = [letters.exact_matching(reply, list(OPTIONS.values())) for reply in replies]
    differing = [
        (reply, mine, other) for reply, mine, other in zip(replies, ours, theirs, strict=True) if mine != other
    ]
    assert differing == []
