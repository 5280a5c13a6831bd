"""Chat turns as prompts, and what a harness gets back."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from PIL import Image

from ilvr_ds.data.decode import decode_image
from ilvr_ds.data.sample import SampleError
from ilvr_ds.evaluation.harness.answering import Answerer, HarnessSettings, question
from ilvr_ds.generation.settings import GenerationSettings
from tests.data.packing import image_bytes
from tests.evaluation.latent_model import LATENT_SIZE, build_latent_model

QUESTION = "Which letter? A or B"


@pytest.mark.parametrize(
    ("turn", "asked"),
    [
        ([b"1", "What?"], "<image>What?"),
        (["Here", b"1", " and ", b"2", "what?"], "Here<image> and <image>what?"),
        ([b"1", "Look at <image>: what?"], "Look at <image>: what?"),
        ([b"1", b"2", "Look at <image>: what?"], "<image><image>Look at : what?"),
        (["What?"], "What?"),
        (["What is an <image>?"], "What is an ?"),
    ],
)
def test_pictures_stand_where_the_turn_has_them(turn: list[str | bytes], asked: str) -> None:
    sample = question(turn, "s")
    assert sample.question == asked
    assert sample.input_images == tuple(part for part in turn if isinstance(part, bytes))


def test_a_picture_in_memory_keeps_its_pixels() -> None:
    picture = Image.effect_noise((30, 20), 80).convert("RGB")
    [data] = question([picture, "What?"], "s").input_images
    assert decode_image(data).tobytes() == picture.tobytes()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_latent_model(tmp_path_factory.mktemp("latent") / "model", QUESTION)


def test_answers_use_latents(model: Path) -> None:
    """A task's limit of one token, a bare letter, does not cut the latents off; a higher limit counts."""
    answerer = Answerer(HarnessSettings(str(model), max_new_tokens=8, precision="fp32"))
    turns = [[image_bytes(size=(60, 40)), QUESTION], [Image.open(io.BytesIO(image_bytes(9))), QUESTION]]
    replies = answerer(turns, GenerationSettings(max_new_tokens=1))
    assert [reply.new_tokens for reply in replies] == [8, 8]
    assert replies[0].latent_steps >= LATENT_SIZE and replies[0].prompt_tokens > 10
    assert "<|" not in replies[0].text
    [more] = answerer(turns[:1], GenerationSettings(max_new_tokens=12))
    assert more.new_tokens == 12 and more.text.startswith(replies[0].text)


def test_draws_do_not_depend_on_batches(model: Path) -> None:
    """Catches numbers that begin again with each batch: the first of all batches would draw alike."""
    turns = [[QUESTION]] * 4
    settings = GenerationSettings(max_new_tokens=12, temperature=20.0)
    said = []
    for size in (4, 2, 1):
        answerer = Answerer(HarnessSettings(str(model), max_new_tokens=12, precision="fp32"))
        batches = [turns[start : start + size] for start in range(0, 4, size)]
        said.append([reply.text for batch in batches for reply in answerer(batch, settings)])
    assert said[0] == said[1] == said[2] and len(set(said[0])) == 4


def test_the_conclusion_alone(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answerer = Answerer(HarnessSettings(str(model), max_new_tokens=2, answer_only=True, precision="fp32"))
    tokenizer = answerer.reasoner.encoder.tokenizer
    monkeypatch.setattr(type(tokenizer), "decode", lambda *_, **__: "A look. The final answer is: B")
    [reply] = answerer([[QUESTION]], GenerationSettings(max_new_tokens=1))
    assert reply.text == "B"


def test_reserved_words_are_refused(model: Path) -> None:
    answerer = Answerer(HarnessSettings(str(model), precision="fp32"))
    with pytest.raises(SampleError, match="im_end"):
        answerer([["What is <|im_end|>?"]], GenerationSettings())
