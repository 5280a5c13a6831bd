"""`generate`: one question with a picture of its latents, a file of questions, a chat."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ilvr_ds.cli import main
from ilvr_ds.tracking.registry import register
from ilvr_ds.tracking.scores import log_scores
from tests.conftest import LATENT_QUESTION
from tests.data.packing import image_bytes
from tests.evaluation.latent_model import LATENT_SIZE

Captured = pytest.CaptureFixture[str]


@pytest.fixture
def image(tmp_path: Path) -> Path:
    (tmp_path / "a.png").write_bytes(image_bytes(size=(60, 40)))
    return tmp_path / "a.png"


def generate(model: Path, *options: object) -> int:
    return main(["generate", "--model", f"{model}", "--max-new-tokens", "12", *map(str, options)])


def write_lines(path: Path, *records: object) -> Path:
    path.write_text("".join(f"{json.dumps(record)}\n" for record in records))
    return path


def test_a_file_is_answered_line_by_line_as_each_question_alone(
    latent_model: Path, image: Path, tmp_path: Path, capsys: Captured
) -> None:
    """Catches a batch that is left out or out of order, and an id or an image that is another's."""
    other = tmp_path / "b.png"
    other.write_bytes(image_bytes(200, size=(90, 90)))
    asked = [(LATENT_QUESTION, image), ("Why?", None), ("What is <image>?", other)]
    records = [
        {"id": f"q{n}", "text_input": text, "image_input": [path.name] if path else []}
        for n, (text, path) in enumerate(asked)
    ]
    questions = write_lines(tmp_path / "questions.jsonl", *records)
    assert generate(latent_model, "--questions", questions, "--batch-size", 2) == 0
    said = capsys.readouterr().out
    lines = [json.loads(line) for line in said.splitlines()]
    assert [(line["id"], line["question"]) for line in lines] == [(f"q{n}", text) for n, (text, _) in enumerate(asked)]
    assert lines[0]["steps"][0] == LATENT_SIZE and f"[segment 1: {LATENT_SIZE} latents]" in lines[0]["marked"]
    for line, (text, path) in zip(lines, asked, strict=True):
        assert generate(latent_model, "--question", text, *(["--image", path] if path else [])) == 0
        assert capsys.readouterr().out == line["response"] + "\n"
    assert generate(latent_model, "--questions", questions, "--output", tmp_path / "answers.jsonl") == 0
    assert (tmp_path / "answers.jsonl").read_text() == said and not capsys.readouterr().out
    assert generate(latent_model, "--questions", questions, "--output", tmp_path / "answers.jsonl") == 2
    assert "answers.jsonl: exists already" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("last", "words"),
    [
        (
            {"text_input": "What?", "image_input": ["gone.png"]},
            "questions.jsonl: line 3: input image 'gone.png' is miss",
        ),
        ({"text_input": "What is <image>?"}, "questions.jsonl: line 3: 1 <image> markers in the question but 0"),
        ({"text_input": "<|im_end|>"}, "questions.jsonl: line 3: the text holds the reserved token <|im_end|>"),
        ({"id": "questions-1", "text_input": "?"}, "questions.jsonl: line 3: the id already stands in line 1"),
    ],
)
def test_a_bad_line_is_named_before_anything_is_answered(
    latent_model: Path, tmp_path: Path, capsys: Captured, last: object, words: str
) -> None:
    questions = write_lines(tmp_path / "questions.jsonl", {"text_input": "Why?"}, {"text_input": "How?"}, last)
    capsys.readouterr()
    assert generate(latent_model, "--questions", questions, "--output", tmp_path / "out", "--batch-size", 1) == 2
    said = capsys.readouterr()
    assert words in said.err and not said.out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["questions.jsonl"]


def test_options_that_do_not_go_together_are_refused(
    latent_model: Path, image: Path, tmp_path: Path, capsys: Captured
) -> None:
    empty = write_lines(tmp_path / "empty.jsonl")
    for options, words in (
        (("--chat", "--output", "a"), "--output: is for a file of questions"),
        (("--question", "?", "--format", "ilvr"), "--format: is for a file of questions"),
        (("--questions", empty, "--image", image), "the records of --questions name their images themselves"),
        (("--question", "?", "--show-latents", "a.png"), "give --question and --image"),
        (("--chat", "--image", image, "--show-latents", "a.png"), "give --question and --image"),
        (("--question", "?", "--image", image, "--show-latents", "a.jpg"), "is written as PNG"),
        (("--questions", empty, "--batch-size", 0), "--batch-size must be 1 or more"),
        (("--questions", empty), "empty.jsonl: holds no question"),
        (("--question", "?", "--temperature", "nan"), "--temperature 0 or more"),
        (("--question", "?", "--temperature", "inf"), "--temperature 0 or more"),
    ):
        assert generate(latent_model, *options) == 2
        assert words in capsys.readouterr().err
    for options in ((), ("--chat", "--question", "?")):
        with pytest.raises(SystemExit, match="2"):
            generate(latent_model, *options)


def test_a_chat_over_a_pipe_ends_at_an_empty_line_or_with_the_input(
    latent_model: Path, image: Path, monkeypatch: pytest.MonkeyPatch, capsys: Captured
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO(f"{LATENT_QUESTION}\n<|im_end|>\nWhy?\n\nnever asked\n"))
    assert generate(latent_model, "--chat", "--image", image) == 0
    said = capsys.readouterr()
    assert said.err.count("tokens a second") == 2 and said.out.strip()
    assert "this cannot be asked: the text holds the reserved token <|im_end|>" in said.err
    monkeypatch.setattr("sys.stdin", io.StringIO(LATENT_QUESTION))
    assert generate(latent_model, "--chat", "--image", image) == 0
    assert said.out.startswith(capsys.readouterr().out)


def test_where_each_latent_looks_is_drawn(latent_model: Path, image: Path, tmp_path: Path, capsys: Captured) -> None:
    picture = tmp_path / "latents.png"
    asked = ("--question", LATENT_QUESTION, "--image", image, "--show-latents", picture)
    assert generate(latent_model, *asked) == 0
    drawn = np.asarray(Image.open(picture).convert("RGB"))
    assert drawn.shape[1] > 500 and len(np.unique(drawn.reshape(-1, 3), axis=0)) > 20
    picture.unlink()
    assert generate(latent_model, *asked, "--max-new-tokens", 1) == 0  # the opening of a segment, without a latent
    assert "not written: the answer has no latent segment" in capsys.readouterr().err and not picture.exists()
    assert generate(latent_model, *asked[:-1], tmp_path / "gone" / "a.png") == 2
    assert "cannot be written" in capsys.readouterr().err


def test_generate_answers_one_question(latent_model: Path, image: Path, tmp_path: Path, capsys: Captured) -> None:
    command = ["generate", "--model", f"{latent_model}", "--question", "How many? A) 1 B) 2", "--max-new-tokens", "8"]
    assert main([*command, "--image", f"{image}"]) == 0
    assert capsys.readouterr().out.strip()
    assert main([*command, "--question", " "]) == 2
    assert "--question: is empty" in capsys.readouterr().err
    assert main([*command, "--question", "<|im_end|> A) 1 B) 2"]) == 2
    assert "--question: " in capsys.readouterr().err
    (tmp_path / "no.png").write_bytes(b"\x89PNG\r\n\x1a\nbroken")
    for path, words in ((f"{tmp_path}/no.png", "not a JPEG"), (f"{tmp_path}/gone.png", "cannot read it")):
        assert main([*command, "--image", path]) == 2
        assert words in capsys.readouterr().err


def test_generate_takes_a_registered_model(
    latent_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Captured
) -> None:
    """Catches a reference that is taken for the name of a folder, and weights that are others by now."""
    store = f"sqlite:///{tmp_path / 'mlflow.db'}"
    folder = tmp_path / "model"
    shutil.copytree(latent_model, folder)
    run = log_scores(store, "e", "run", {}, {}, [])
    (folder / "training.json").write_text(json.dumps({"step": 1, "mlflow_run_id": run, "tracking_uri": store}))
    reference = register(folder, "name", None)
    command = ["generate", "--model", reference, "--question", "How many? A) 1 B) 2", "--max-new-tokens", "8"]
    assert main([*command, "--tracking-uri", store]) == 0
    assert capsys.readouterr().out.strip()
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    assert main(command) == 2
    assert "--model: models:/ needs a registry" in capsys.readouterr().err
    with (folder / "model.safetensors").open("ab") as file:
        file.write(b"!")
    assert main([*command, "--tracking-uri", store]) == 2
    assert "are not those that were registered" in capsys.readouterr().err
