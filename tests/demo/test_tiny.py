from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoConfig, AutoModelForImageTextToText, AutoTokenizer, Qwen2_5_VLForConditionalGeneration
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from ilvr_ds.data.sample import LatentStep, Sample, TextStep
from ilvr_ds.data.tokens import LATENT_TOKENS, load_tokenizer
from ilvr_ds.demo.task import TaskSpec, draw_samples
from ilvr_ds.demo.task.drawing import CELL, encode_scene
from ilvr_ds.demo.task.scene import Figure, Scene
from ilvr_ds.demo.tiny import MINI, SMALL, SPECIAL_TOKENS, TINY, TinySize, build_tiny_model
from tests.data.packing import contents

FAMILIES = ["qwen2_5_vl", "qwen3_vl"]
TEXTS = [
    " ".join([sample.question, *(step.content for step in sample.steps if isinstance(step, TextStep))])
    for sample in draw_samples(TaskSpec(), 0, "train", 80)
]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    build_tiny_model(folder, texts=TEXTS, size=TINY)
    return folder


@pytest.fixture(scope="module")
def model(tiny: Path) -> Any:
    return Qwen2_5_VLForConditionalGeneration.from_pretrained(tiny).eval()


@pytest.fixture(scope="module")
def tokenizer(tiny: Path) -> Any:
    return AutoTokenizer.from_pretrained(tiny)


def test_text_survives_the_tokenizer(tokenizer: Any) -> None:
    for text in ["Delete every red shape.", " two  spaces\n\n1234 it's 中文 é 🙂", *TEXTS[:8]]:
        assert tokenizer.decode(tokenizer(text).input_ids) == text


def test_words_of_the_task_are_single_tokens(tokenizer: Any) -> None:
    assert len(tokenizer(" Which shape is in the marked cell?").input_ids) == 8
    assert len(tokenizer(" 12").input_ids) == 3, "digits stand one by one, as in Qwen's tokenizer"


def test_special_tokens_follow_the_vocabulary_in_qwens_order(tokenizer: Any) -> None:
    ids = tokenizer.convert_tokens_to_ids(list(SPECIAL_TOKENS))
    assert ids == list(range(len(tokenizer) - len(SPECIAL_TOKENS), len(tokenizer)))
    assert tokenizer("a<|vision_start|><|image_pad|>b").input_ids[1:3] == [ids[9], ids[12]]
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|im_end|>", "<|endoftext|>")


def test_the_configuration_names_the_tokenizers_ids(tiny: Path, tokenizer: Any) -> None:
    config = AutoConfig.from_pretrained(tiny)
    names = {
        "image_token_id": "<|image_pad|>",
        "video_token_id": "<|video_pad|>",
        "vision_start_token_id": "<|vision_start|>",
        "vision_end_token_id": "<|vision_end|>",
    }
    for key, token in names.items():
        assert getattr(config, key) == tokenizer.convert_tokens_to_ids(token)
    assert config.text_config.eos_token_id == tokenizer.eos_token_id


def test_the_chat_template_says_what_qwens_says(tokenizer: Any) -> None:
    user = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "How many?"}]}
    prompt = (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
        "<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>How many?<|im_end|>\n<|im_start|>assistant\n"
    )
    assert tokenizer.apply_chat_template([user], tokenize=False, add_generation_prompt=True) == prompt
    answered = [user, {"role": "assistant", "content": "Two. "}]
    assert tokenizer.apply_chat_template(answered, tokenize=False) == prompt + "Two. <|im_end|>\n"
    system = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    wanted = "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
    assert tokenizer.apply_chat_template(system, tokenize=False) == wanted


@pytest.mark.parametrize("vocab_size", [320, 381, 495])
def test_the_latent_tokens_fit_into_the_rows(tmp_path: Path, vocab_size: int) -> None:
    size = TinySize(64, 96, 2, 4, 2, vision_hidden_size=32, vision_heads=2, vocab_size=vocab_size)
    texts = [f"{a}{b}{c} " for a in "abcdefgh" for b in "ijklmnop" for c in "qrstuvwx"]
    build_tiny_model(tmp_path, texts=texts, size=size)
    rows = AutoConfig.from_pretrained(tmp_path).text_config.vocab_size
    before = len(AutoTokenizer.from_pretrained(tmp_path))
    with_latents, special = load_tokenizer(str(tmp_path))
    assert before == vocab_size + len(SPECIAL_TOKENS)
    assert len(with_latents) == before + len(LATENT_TOKENS) <= rows
    assert rows % 64 == 0 and rows - len(with_latents) < 64
    assert special.latent_pad == before


def test_the_same_seed_gives_the_same_files(tiny: Path, tmp_path: Path) -> None:
    state = torch.get_rng_state()
    build_tiny_model(tmp_path / "same", texts=iter(TEXTS), size=TINY)
    build_tiny_model(tmp_path / "other", texts=iter(TEXTS), size=TINY, seed=1)
    assert torch.equal(torch.get_rng_state(), state), "the caller's random numbers are left alone"
    files = contents(tiny)
    assert contents(tmp_path / "same") == files
    others = contents(tmp_path / "other")
    assert [name for name in files if others[name] != files[name]] == ["model.safetensors"]


def test_a_picture_and_text_go_through_the_stock_forward(tiny: Path, model: Any, tokenizer: Any) -> None:
    sample = next(draw_samples(TaskSpec(), 0, "train", 1))
    images = Qwen2VLImageProcessorPil.from_pretrained(tiny)([_image(sample.input_images[0])], return_tensors="pt")
    assert images["image_grid_thw"].tolist() == [[1, 8, 8]], "one merged patch a cell, no resizing"
    chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": sample.question}]}]
    prompt = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    inputs = tokenizer(prompt.replace("<|image_pad|>", "<|image_pad|>" * 16), return_tensors="pt")
    is_image = inputs.input_ids == model.config.image_token_id
    with torch.no_grad():
        logits = model(**inputs, **images, mm_token_type_ids=is_image.long()).logits
        blank = model(**inputs, **(images | {"pixel_values": images["pixel_values"] * 0}), mm_token_type_ids=is_image)
    assert logits.shape == (1, inputs.input_ids.shape[1], model.config.text_config.vocab_size)
    assert logits.isfinite().all() and not torch.allclose(logits, blank.logits, atol=1e-4)


def test_small_has_the_size_that_it_says(tmp_path: Path) -> None:
    build_tiny_model(tmp_path, texts=TEXTS, size=SMALL)
    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(tmp_path)
    language = sum(parameter.numel() for parameter in model.model.language_model.parameters())
    assert 20e6 < language < 30e6
    check_that_features_tell_cells(tmp_path, model.eval())


def test_features_tell_cells(tiny: Path, model: Any) -> None:
    check_that_features_tell_cells(tiny, model)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_tower_that_has_seen_trails_tells_the_cells_of_a_picture(family: str, tmp_path: Path) -> None:
    """Whitened on blobs the nearest other cell is so near that a latent that is nearly right names it."""
    samples = draw_samples(TaskSpec(operations=("trail",), signs=3), 0, "train", 40)
    pictures = [_image(png) for sample in samples for png in sample.helper_images]
    nearest = {}
    for name, seen in (("blobs", []), ("trails", pictures[:90])):
        build_tiny_model(tmp_path / name, texts=TEXTS, size=MINI, family=family, pictures=seen)
        tower = AutoModelForImageTextToText.from_pretrained(tmp_path / name).model.visual
        inputs = Qwen2VLImageProcessorPil.from_pretrained(tmp_path / name)(pictures[90:], return_tensors="pt")
        with torch.no_grad():
            cells = tower(inputs["pixel_values"], grid_thw=inputs["image_grid_thw"]).pooler_output.view(30, 16, -1)
        unit = torch.nn.functional.normalize(cells, dim=2)
        nearest[name] = (unit @ unit.mT - 2 * torch.eye(16)).amax(dim=2).mean().item()
    assert nearest["trails"] < 0.5 < 0.6 < nearest["blobs"], nearest


@pytest.mark.parametrize("family", FAMILIES)
def test_a_mark_adds_the_same_to_every_cell(family: str, tmp_path: Path) -> None:
    """Else a student must learn each marked cell by itself: the cosine was 0.47 before the merger was made linear."""
    samples = list(draw_samples(TaskSpec(operations=("trail",), signs=3), 0, "train", 40))
    pictures = [[_image(png) for png in sample.helper_images[:2]] for sample in samples]
    build_tiny_model(tmp_path, texts=TEXTS, size=MINI, family=family, pictures=[two[0] for two in pictures[:30]])
    tower = AutoModelForImageTextToText.from_pretrained(tmp_path).model.visual
    images = Qwen2VLImageProcessorPil.from_pretrained(tmp_path)
    inputs = images([picture for two in pictures[30:] for picture in two], return_tensors="pt")
    with torch.no_grad():
        cells = tower(inputs["pixel_values"], grid_thw=inputs["image_grid_thw"]).pooler_output.view(10, 2, 16, -1)
    left = torch.tensor([_marked_cell(sample, 0) for sample in samples[30:]])
    marked, plain = (cells[torch.arange(10), picture, left] for picture in (0, 1))
    mark = (marked - plain).mean(0)
    assert torch.nn.functional.cosine_similarity(plain + mark, marked).mean() > 0.9


def _marked_cell(sample: Sample, picture: int) -> int:
    """The number of the cell that holds the mark in a helper picture."""
    region = [step.region for step in sample.steps if isinstance(step, LatentStep)][picture]
    assert region is not None
    return round(region[1] / CELL) * 4 + round(region[0] / CELL)


def test_features_and_embeddings_have_one_scale(tiny: Path, model: Any) -> None:
    features, _ = _features(tiny, model, np.random.default_rng(3), pictures=8)
    embeddings = model.get_input_embeddings().weight.detach().numpy()
    for values in (features, embeddings):
        assert 0.8 < np.sqrt((values**2).mean()) < 1.25


def check_that_features_tell_cells(folder: Path, model: Any) -> None:
    """Nearest centroid from a feature to its cell's content, on other pictures than the centroids come from."""
    rng = np.random.default_rng(0)
    known, kinds = _features(folder, model, rng, pictures=60)
    fresh, truth = _features(folder, model, rng, pictures=20)
    centroids = np.stack([known[kinds == kind].mean(axis=0) for kind in range(len(KINDS))])
    distances = ((fresh[:, None] - centroids) ** 2).sum(axis=-1)
    assert (distances.argmin(axis=1) == truth).mean() > 0.95

    spread = np.linalg.norm(fresh - centroids[truth], axis=1).max()
    gaps = np.linalg.norm(centroids[:, None] - centroids, axis=-1) + np.eye(len(KINDS)) * 1e9
    assert spread < 0.5 * gaps.min(), "a cell's place and neighbours must change its feature less than its content"
    unit = centroids / np.linalg.norm(centroids, axis=1, keepdims=True)
    assert (unit @ unit.T)[~np.eye(len(KINDS), dtype=bool)].mean() < 0.6, "flat white must not outshine the shapes"


SPEC = TaskSpec(shapes=8, colours=8)
KINDS: list[Figure | None] = [None, *(Figure(c, s) for c in SPEC.colour_names for s in SPEC.shape_names)]


def _features(folder: Path, model: Any, rng: np.random.Generator, pictures: int) -> tuple[np.ndarray, np.ndarray]:
    """Merged features [cells, D] of 6x6 pictures and the kind of each cell."""
    contents = rng.integers(len(KINDS), size=(pictures, 6, 6))
    images = [
        _image(encode_scene(Scene(6, 6, {place: KINDS[k] for place, k in np.ndenumerate(kinds) if KINDS[k]})))
        for kinds in contents
    ]
    inputs = Qwen2VLImageProcessorPil.from_pretrained(folder)(images, return_tensors="pt")
    with torch.no_grad():
        features = model.model.get_image_features(inputs["pixel_values"], inputs["image_grid_thw"]).pooler_output
    return torch.cat(list(features)).numpy(), contents.ravel()


def _image(png: bytes) -> Image.Image:
    return Image.open(io.BytesIO(png)).convert("RGB")
