"""The interface of docs/python.md."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

import ilvr_ds
from ilvr_ds.api import _encoded
from ilvr_ds.data.sample import SampleError
from ilvr_ds.demo.tiny import build_tiny_model
from ilvr_ds.errors import UserError
from ilvr_ds.generation.generate import Generator
from ilvr_ds.generation.settings import GenerationSettings
from tests.data.packing import image_bytes
from tests.evaluation.latent_model import LATENT_SIZE, build_latent_model
from tests.golden_set import golden_set
from tests.ranks import ROOT


@pytest.fixture(scope="module")
def model(golden_model: Path) -> ilvr_ds.Model:
    return ilvr_ds.load(golden_model, device="cpu", latent_size=golden_set().settings["latent_size"])


def test_asking_is_what_generation_says(model: ilvr_ds.Model, tmp_path: Path) -> None:
    """From a file, from bytes and from a picture in memory, alone and beside others."""
    sample = next(s for s in golden_set().samples if len(s.input_images) == 1 and "<image>" not in s.question)
    prompt = model.reasoner.encoder.prompt(sample)
    [expected] = Generator(model.reasoner, GenerationSettings(max_new_tokens=8))([prompt]).answers
    [data] = sample.input_images
    (tmp_path / "a.png").write_bytes(data)
    for image in (tmp_path / "a.png", str(tmp_path / "a.png"), data, ilvr_ds.decode_image(data)):
        reply = model.ask(image, sample.question, max_new_tokens=8)
        assert (reply.text, reply.steps, reply.is_whole) == (expected.text, expected.steps, not expected.hit_limit)
    pairs = [([data], sample.question), ([], "?"), ([data, data], "one two")]
    replies = model.ask_all(pairs, batch_size=2, max_new_tokens=8)
    assert replies[0].text == expected.text and len(replies) == 3
    assert all(len(part) == steps for reply in replies for part, steps in zip(reply.latents, reply.steps, strict=True))


def test_a_picture_in_memory_is_what_its_file_shows(model: ilvr_ds.Model, tmp_path: Path) -> None:
    """Catches a photo that is asked about as it lies in the file, and modes that no PNG holds."""
    exif, file = Image.Exif(), tmp_path / "a.jpg"
    exif[0x0112] = 6
    for mode in ("RGB", "CMYK", "L"):
        Image.effect_mandelbrot((84, 56), (-2, -1, 1, 1), 9).convert(mode).save(file, exif=exif)
        upright = ilvr_ds.decode_image(file.read_bytes())
        assert upright.size == (56, 84)
        assert ilvr_ds.decode_image(_encoded(Image.open(file))).tobytes() == upright.tobytes()
    closed = Image.open(file)
    closed.close()
    for image, words in (
        (Image.new("F", (56, 56)), "question 1: a picture of mode F; give it as RGB, by image.convert"),
        (closed, r"question 1: a picture in memory that cannot be read \(Operation on closed image"),
        (Image.new("RGB", (0, 56)), r"question 1: a picture in memory that cannot be read \(cannot write empty"),
    ):
        with pytest.raises(UserError, match=words):
            model.ask(image, "?")


@pytest.mark.parametrize(
    ("images", "question", "words"),
    [
        ([], "  ", "question 1: it is empty"),
        ("none.png", "?", r"question 1: cannot read none.png \(No such file"),
        (b"text", "?", "question 1: "),
        ([], "<image>?", "question 1: "),
    ],
)
def test_a_question_that_cannot_be_asked_is_named(
    images: object, question: str, words: str, model: ilvr_ds.Model
) -> None:
    with pytest.raises(UserError, match=words):
        model.ask(images, question)  # type: ignore[arg-type]


def test_settings_are_checked(model: ilvr_ds.Model) -> None:
    for wrong in (
        {"temperature": -1.0}, {"temperature": float("nan")}, {"temperature": float("inf")}, {"top_p": 0.0},
        {"max_new_tokens": 0}, {"stop": [""]},
    ):  # fmt: skip
        with pytest.raises(UserError, match="ask: batch_size and max_new_tokens must be 1 or more"):
            model.ask([], "?", **wrong)  # type: ignore[arg-type]


def test_what_cannot_be_loaded_is_said_without_options(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^load: (?!.*--)"):
        ilvr_ds.load(tmp_path, device="cpu")
    with pytest.raises(UserError, match="load: precision is 'int8'; valid: auto, fp32, bf16, fp16"):
        ilvr_ds.load(tmp_path, precision="int8")
    for device in ("gpu", "cuda:99"):
        with pytest.raises(UserError, match=f"load: device is '{device}', which is not here"):
            ilvr_ds.load(tmp_path, device=device)


def test_where_latents_look_is_drawn(tmp_path: Path) -> None:
    """And nothing is, where there is nothing to draw."""
    model = ilvr_ds.load(build_latent_model(tmp_path / "model", "How many?"), device="cpu")
    image, picture = image_bytes(size=(60, 40)), tmp_path / "latents.png"
    reply = model.ask(image, "How many?", max_new_tokens=6)
    assert reply.steps[0] == LATENT_SIZE and reply.tokens[0] == model.reasoner.special.latent_start
    model.draw_latents(image, "How many?", reply, picture)
    assert len(Image.open(picture).convert("RGB").getcolors(1 << 20) or []) > 20, "maps, not an empty page"
    for images, said, path, words in (
        (image, model.ask(image, "How many?", max_new_tokens=1), picture, "the reply has no latents"),
        ([], reply, picture, "there is no image"),
        (image, reply, tmp_path / "gone/a.png", "cannot write .*gone/a.png"),
    ):
        with pytest.raises(UserError, match=f"draw_latents: {words}"):
            model.draw_latents(images, "How many?", said, path)  # type: ignore[arg-type]


def test_a_base_answers_where_that_is_asked_for(tmp_path: Path) -> None:
    """Catches a comparison with the model before training that cannot be made."""
    build_tiny_model(tmp_path, texts=["How many?"])
    with pytest.raises(UserError, match=r"lacks <\|latent_pad"):
        ilvr_ds.load(tmp_path, device="cpu")
    reply = ilvr_ds.load(tmp_path, device="cpu", without_latents=True).ask([], "How many?", max_new_tokens=4)
    assert reply.steps == () and len(reply.tokens) == 4


def test_answers_are_judged() -> None:
    question = "How many? A) one B) two"
    assert next(iter(ilvr_ds.judge("The final answer is: (B)", "B", question).values())) is True
    assert next(iter(ilvr_ds.judge("The final answer is: (A)", "B", question).values())) is False
    assert ilvr_ds.judge("The final answer is: 7", "7", benchmark="exact-match") == {"exact-match": True}
    assert list(ilvr_ds.judge("(B)", "B", question, benchmark="vstar").values()) == [True, True]
    for answer, name in (("", "comt"), ("B", "nothing"), ("", "vsp"), ("B", "vstar")):
        with pytest.raises(UserError):
            ilvr_ds.judge("?", answer, benchmark=name)


def test_images_are_decoded() -> None:
    with pytest.raises(SampleError):
        ilvr_ds.decode_image(b"text")


def test_the_package_imports_without_torch() -> None:
    code = "import sys, ilvr_ds; ilvr_ds.__version__; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_the_page_has_every_name_and_its_program_packs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text = (ROOT / "docs/python.md").read_text()
    for name in set(ilvr_ds.__all__) - {"Model", "Reply", "__version__"}:
        assert f"`ilvr_ds.{name}(" in text and callable(getattr(ilvr_ds, name))
    monkeypatch.chdir(tmp_path)
    for name in ("a.png", "b.png"):
        Image.new("RGB", (56, 56), "red").save(name)
    program = re.findall(r"```python\n(.*?)```", text, re.DOTALL)[1]
    exec(program, {"ilvr_ds": ilvr_ds})
    assert "1 samples in 1 shard" in capsys.readouterr().out
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        ilvr_ds.nothing  # noqa: B018
