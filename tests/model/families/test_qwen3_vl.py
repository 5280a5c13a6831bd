"""A tiny random Qwen3-VL against transformers' own: features, positions, states, gradients, stage 2, generation."""

from __future__ import annotations

import inspect
import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from PIL import Image
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import AutoModelForImageTextToText, AutoTokenizer, Qwen3VLMoeConfig
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.qwen3_vl import modeling_qwen3_vl as stock_module

from ilvr_ds.config import LossConfig
from ilvr_ds.data.sample import Sample, SampleError, TextStep
from ilvr_ds.data.template import SampleEncoder
from ilvr_ds.data.tokens import load_tokenizer
from ilvr_ds.data.window import MicroBatch, Window
from ilvr_ds.distill.stage2 import StageTwo
from ilvr_ds.errors import UserError
from ilvr_ds.generation.generate import Generator
from ilvr_ds.generation.loading import load_reasoner
from ilvr_ds.generation.settings import GenerationSettings
from ilvr_ds.model.injection import last_hidden, write_images
from ilvr_ds.model.layers.attention import use_packed_attention
from ilvr_ds.model.student import load_config, load_student, vision_layout
from ilvr_ds.model.vision import VisionTower
from tests.evaluation.exporting import export_base
from tests.model.conftest import tower_of
from tests.model.test_rollout import assert_equals_recomputing, by_recomputing, features_of, model_of
from tests.qwen3_set import Qwen3Set, qwen3_set, with_latent_tokens

CPU = torch.device("cpu")
ALL = list(range(8))
"""One to several images, 0 to 4 segments; the last two without images."""
MIXED = [5, 0, 6, 4, 7]
"""0, 3, 1, 2 and 0 segments."""


@pytest.fixture(scope="module")
def golden(tmp_path_factory: pytest.TempPathFactory) -> Qwen3Set:
    return qwen3_set(tmp_path_factory.mktemp("qwen3") / "model")


@pytest.fixture(scope="module")
def stock(golden: Qwen3Set) -> Any:
    """Whole, in fp32 and evaluation mode; not to be changed."""
    return AutoModelForImageTextToText.from_pretrained(golden.weights, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def tower(golden: Qwen3Set) -> VisionTower:
    return tower_of(load_student(golden.model, torch.float32, num_tokens=0), golden.encoder.images)


def pixels_of(golden: Qwen3Set, sample: Sample) -> dict[str, Tensor]:
    """A sample's images as the stock processor gives them to the stock model."""
    if not sample.input_images:
        return {}
    images = [Image.open(io.BytesIO(data)).convert("RGB") for data in sample.input_images]
    return dict(Qwen2VLImageProcessorPil.from_pretrained(golden.processor)(images, return_tensors="pt"))


def stock_inputs(golden: Qwen3Set, number: int) -> dict[str, Tensor]:
    """One sample without padding, latent pads as plain tokens."""
    ids = torch.from_numpy(golden.encoded[number].input_ids)[None]
    is_image = (ids == golden.encoder.special.image_pad).int()
    return {"input_ids": ids, "mm_token_type_ids": is_image, **pixels_of(golden, golden.samples[number])}


def plain(golden: Qwen3Set, model: Any, indices: list[int], rows: str) -> Window:
    """A window of samples; the model's attention is what the rows need."""
    if rows == "packed":
        use_packed_attention(model.model.language_model, "sdpa", CPU, torch.float32)
    return golden.window(indices, len(indices), rows)


def states(model: Any, micro: MicroBatch, features: Tensor) -> Tensor:
    language_model = model.model.language_model
    embeddings = write_images(language_model.embed_tokens(micro.tokens.input_ids), micro.tokens, features)
    return last_hidden(language_model, micro.tokens, embeddings, features=features)


def test_features_are_the_stock_towers(golden: Qwen3Set, stock: Any, tower: VisionTower) -> None:
    """Merged ones, and behind each what deepstack adds; of images of several sizes together."""
    window = golden.window(ALL, len(ALL), "right")
    files = [data for sample in golden.samples for data in sample.input_images]
    files += [data for sample in golden.samples for data in sample.helper_images]
    images = [Image.open(io.BytesIO(data)).convert("RGB") for data in files]
    inputs = Qwen2VLImageProcessorPil.from_pretrained(golden.processor)(images, return_tensors="pt")
    assert len({tuple(grid) for grid in inputs["image_grid_thw"].tolist()}) > 3
    with torch.no_grad():
        found = stock.model.visual(inputs["pixel_values"], grid_thw=inputs["image_grid_thw"])
    wanted = torch.cat([found.pooler_output, *found.deepstack_features], dim=1)
    features = tower(window.images[0])
    assert features.shape == wanted.shape == (len(features), 3 * 64)
    assert (features - wanted).abs().max() < 1e-5 * wanted.abs().max()
    assert all(part.abs().mean() > 0.1 for part in features.split(64, dim=1))


@pytest.mark.parametrize("number", ALL)
def test_positions_are_the_stock_models(golden: Qwen3Set, stock: Any, number: int) -> None:
    inputs = stock_inputs(golden, number)
    grids = inputs.get("image_grid_thw")
    wanted, _ = stock.model.get_rope_index(inputs["input_ids"], inputs["mm_token_type_ids"], image_grid_thw=grids)
    assert torch.equal(torch.from_numpy(golden.encoded[number].position_ids), wanted[:, 0])


@pytest.fixture(scope="module", params=[False, True], ids=["untied", "tied"])
def expected(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """States and logits of each sample alone by the stock model, and the gradients of the sum of all losses."""
    golden = qwen3_set(tmp_path_factory.mktemp("expected") / "model", request.param)
    stock = AutoModelForImageTextToText.from_pretrained(golden.weights, dtype=torch.float32).eval()
    stock.model.visual.requires_grad_(False)
    hidden, logits = [], []
    for number in ALL:
        output = stock(**stock_inputs(golden, number), output_hidden_states=True)
        labels = torch.from_numpy(golden.encoded[number].labels)
        cross_entropy(output.logits[0, :-1], labels[1:], reduction="sum").backward()
        hidden.append(output.hidden_states[-1][0].detach())
        logits.append(output.logits[0].detach())
    grads = {name: weight.grad for name, weight in stock.named_parameters() if weight.grad is not None}
    return {"golden": golden, "hidden": hidden, "logits": logits, "grads": grads}


@pytest.mark.parametrize("rows", ["packed", "right", "left"])
def test_states_logits_and_gradients_are_the_stock_models(
    expected: dict[str, Any], tower: VisionTower, rows: str
) -> None:
    """Several images, none, padding on either side. Catches features that are added at other places or layers."""
    golden = expected["golden"]
    model = load_student(golden.model, torch.float32, 0)
    model.model.visual.requires_grad_(False)
    micro = plain(golden, model, ALL, rows).micro_batches[0]
    features = tower(golden.window(ALL, len(ALL), rows).images[0])
    hidden = states(model, micro, features).flatten(0, 1)
    real = hidden[micro.tokens.real.flatten()]
    logits = model.lm_head(real)
    for found, wanted in ((real, expected["hidden"]), (logits, expected["logits"])):
        assert (found - torch.cat(wanted)).abs().max() < 1e-5 * torch.cat(wanted).abs().max()
    cross_entropy(model.lm_head(hidden[micro.label_rows]), micro.label_ids, reduction="sum").backward()
    grads = {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}
    assert grads.keys() == expected["grads"].keys()
    for name, wanted in expected["grads"].items():
        assert (grads[name] - wanted).norm() < 1e-5 * wanted.norm(), name


def test_what_is_added_matters(golden: Qwen3Set, tower: VisionTower) -> None:
    """The cases above could tell; and images without features are an error, not something else in silence."""
    model = load_student(golden.model, torch.float32, 0)
    window = golden.window(ALL, len(ALL), "right")
    micro, features = window.micro_batches[0], tower(window.images[0])
    with torch.no_grad():
        added, left_out = states(model, micro, features), states(model, micro, features[:, :64])
        assert (added - left_out).abs().max() > 0.01 * added.abs().max()
        with pytest.raises(RuntimeError, match="images, but no features"):
            last_hidden(model.model.language_model, micro.tokens, added)


def test_transformers_still_adds_by_what_is_replaced() -> None:
    """Positions would be taken for a mask: see Qwen3VL.added_arguments."""
    function = inspect.unwrap(stock_module.Qwen3VLTextModel.forward)
    assert "_deepstack_process" in function.__code__.co_names, f"transformers {transformers.__version__} has moved"


@pytest.mark.parametrize("rows", ["packed", "right", "left"])
def test_a_part_of_a_batch_keeps_its_images(golden: Qwen3Set, tower: VisionTower, rows: str) -> None:
    """As a teacher reads a window that is too long for it."""
    model = load_student(golden.model, torch.float32, 0)
    window = plain(golden, model, ALL, rows)
    features = tower(window.images[0])
    language_model, tokens = model.model.language_model, window.tokens
    with torch.no_grad():
        whole = states(model, window.micro_batches[0], features)
        embeddings = write_images(language_model.embed_tokens(tokens.input_ids), tokens, features)
        for samples in (range(0, 3), range(3, 7), range(7, 8)):
            place = tokens.places(samples)
            part = last_hidden(language_model, tokens.of(samples), embeddings[place], features=features)
            real = tokens.real[place]
            torch.testing.assert_close(part[real], whole[place][real], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("is_recorded", [False, True], ids=["called", "recorded"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_the_rollout_equals_recomputing_every_prefix(golden: Qwen3Set, side: str, is_recorded: bool) -> None:
    """Loss and all gradients of stage 2 in float64: images are added in the first text, latents get nothing."""
    assert_equals_recomputing(golden, MIXED, side, is_recorded, checkpointing=True)


@pytest.mark.parametrize("is_recorded", [False, True], ids=["called", "recorded"])
@pytest.mark.parametrize("rows", ["packed", "left", "right"])
def test_detached_latents_are_those_of_recomputing(golden: Qwen3Set, rows: str, is_recorded: bool) -> None:
    model = model_of(golden)
    features = features_of(golden.free_window(MIXED, len(MIXED), "left").micro_batches[0], model)
    wanted, _, _ = by_recomputing(golden, model, features, MIXED, "left")
    if rows == "packed":
        use_packed_attention(model.model.language_model, "sdpa", CPU, torch.float64)
    micro = golden.free_window(MIXED, len(MIXED), rows).micro_batches[0]
    size = golden.settings["latent_size"]
    stage = StageTwo(model, LossConfig(), 0, size, "detached", has_recorded_latents=is_recorded)
    hidden = stage.hidden(micro, features)
    left = golden.free_window(MIXED, len(MIXED), "left").micro_batches[0].tokens.real
    assert float((hidden[micro.tokens.real] - wanted[left]).detach().abs().max()) < 1e-10


def test_generation_is_stock_generation_where_no_latent_runs(golden: Qwen3Set, stock: Any, tmp_path: Path) -> None:
    reasoner = load_reasoner(str(with_latent_tokens(golden, tmp_path / "model")), CPU, "fp32", latent_size=2)
    special = reasoner.special
    never = [special.latent_start, special.latent_pad, special.latent_end, *reasoner.stop_ids]
    settings = GenerationSettings(max_new_tokens=12, forbidden=tuple(never))
    samples = [golden.samples[number] for number in (1, 4, 6)]
    prompts = [reasoner.encoder.prompt(sample) for sample in samples]
    answers = Generator(reasoner, settings)(prompts).answers
    for sample, prompt, answer in zip(samples, prompts, answers, strict=True):
        ids = torch.from_numpy(prompt.input_ids)[None]
        inputs = {"input_ids": ids, "mm_token_type_ids": (ids == special.image_pad).int(), **pixels_of(golden, sample)}
        found = stock.generate(**inputs, max_new_tokens=12, do_sample=False, suppress_tokens=never)
        assert answer.tokens == found[0, ids.shape[1] :].tolist()


def test_latents_in_generation_are_those_of_stage_2(golden: Qwen3Set, tmp_path: Path) -> None:
    """A cache of keys and values beside recomputing: one forced segment in a padded batch and alone."""
    reasoner = load_reasoner(str(with_latent_tokens(golden, tmp_path / "model")), CPU, "fp32", latent_size=2)
    settings = GenerationSettings(
        max_new_tokens=8, forced={1: reasoner.special.latent_start}, forbidden=reasoner.stop_ids, keep_latents=True
    )
    prompts = [reasoner.encoder.prompt(golden.samples[number]) for number in (1, 4, 6)]
    together = Generator(reasoner, settings)(prompts).answers
    for prompt, answer in zip(prompts, together, strict=True):
        [alone] = Generator(reasoner, settings)([prompt]).answers
        assert alone.tokens == answer.tokens and alone.steps == answer.steps == (2,)
        torch.testing.assert_close(torch.cat(alone.latents), torch.cat(answer.latents), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("is_tied", [False, True])
def test_what_is_exported_loads_in_stock_transformers(
    is_tied: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the names of the releases, nothing missing, and it says the same; the rotation in words of version 4."""
    found = qwen3_set(tmp_path / "base", is_tied)
    written = export_base(found.weights, tmp_path / "out", monkeypatch)
    content = json.loads((written / "config.json").read_text())
    assert content["architectures"] == ["Qwen3VLForConditionalGeneration"] and content["latent_size"] == 4
    rope = {"mrope_interleaved": True, "mrope_section": [6, 5, 5], "rope_type": "default"}
    assert content["text_config"]["rope_scaling"] == rope and content["text_config"]["rope_theta"] == 1e6
    names = set(json.loads((written / "model.safetensors.index.json").read_text())["weight_map"])
    assert {name.split(".")[1] for name in names if name != "lm_head.weight"} == {"visual", "language_model"}
    assert ("lm_head.weight" in names) is not is_tied
    base = AutoModelForImageTextToText.from_pretrained(found.weights, dtype=torch.float32).eval()
    model, info = AutoModelForImageTextToText.from_pretrained(written, dtype=torch.float32, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"], info
    with torch.no_grad():
        inputs = stock_inputs(found, 1)
        assert torch.equal(model.eval()(**inputs).logits, base(**inputs).logits)


THINKING = """\
{%- set ns = namespace(last=-1) -%}
{%- for message in messages -%}
{%- if message.role == 'user' -%}{%- set ns.last = loop.index0 -%}{%- endif -%}
{%- endfor -%}
{%- for message in messages -%}
{{- '<|im_start|>' + message.role + '\\n' -}}
{%- if message.content is string -%}
{%- set content = message.content -%}{%- set thought = message.reasoning_content or '' -%}
{%- if message.role == 'assistant' and loop.index0 > ns.last -%}
{{- '<think>\\n' + thought.strip('\\n') + '\\n</think>\\n\\n' + content.lstrip('\\n') -}}
{%- else -%}{{- content -}}{%- endif -%}
{%- else -%}
{%- for part in message.content -%}
{%- if part.type == 'image' -%}{{- '<|vision_start|><|image_pad|><|vision_end|>' -}}
{%- elif part.type == 'text' -%}{{- part.text -}}{%- endif -%}
{%- endfor -%}
{%- endif -%}
{{- '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n<think>\\n' -}}{%- endif -%}"""
"""As the Thinking releases': a prompt ends within a thought, and the last answer has one."""


@pytest.fixture(scope="module")
def thinking(golden: Qwen3Set, tmp_path_factory: pytest.TempPathFactory) -> SampleEncoder:
    folder = tmp_path_factory.mktemp("thinking")
    tokenizer = AutoTokenizer.from_pretrained(golden.processor)
    tokenizer.add_tokens(["<think>", "</think>"])
    tokenizer.chat_template = THINKING
    tokenizer.save_pretrained(folder)
    tokenizer, special = load_tokenizer(str(folder))
    return SampleEncoder(tokenizer, special, golden.encoder.images, golden.settings["latent_size"], max_tokens=2**20)


@pytest.mark.parametrize("number", ALL)
def test_a_thinking_release_reasons_in_its_thought(golden: Qwen3Set, thinking: SampleEncoder, number: int) -> None:
    """Latents too; the last text is the answer. What is asked is how what was learnt begins."""
    sample, encoded = golden.samples[number], thinking(golden.samples[number])
    prompt = thinking.prompt(sample).input_ids
    before = next(i for i in reversed(range(len(sample.steps))) if isinstance(sample.steps[i], TextStep))
    if before:
        assert encoded.input_ids[: len(prompt)].tolist() == prompt.tolist()
    text = thinking.tokenizer.decode(encoded.input_ids[encoded.assistant :])
    opening, _, answer = text.partition("</think>\n\n")
    assert opening.startswith("<|im_start|>assistant\n<think>\n") and thinking.tokenizer.decode(prompt).endswith(
        "<|im_start|>assistant\n<think>\n"
    )
    assert answer == f"{sample.steps[before].content}<|im_end|>\n"
    assert opening.count("<|latent_start|>") == len(encoded.segments) == len(sample.helper_images)
    pads = encoded.input_ids[encoded.segments]
    assert (pads == thinking.special.latent_pad).all()
    shown = thinking.tokenizer.decode(encoded.input_ids[encoded.answer[0] : encoded.answer[1]]).strip()
    assert (sample.answer or "") in shown and ("</think>" not in shown)


def test_a_text_cannot_end_a_thought(golden: Qwen3Set, thinking: SampleEncoder) -> None:
    sample = replace(golden.samples[0], question="</think> 7")
    with pytest.raises(SampleError, match="reserved token </think>"):
        thinking(sample)
    golden.encoder(sample)  # of an Instruct release it is a text like any other


def test_a_template_that_never_begins_an_answer_as_it_asks_is_refused(golden: Qwen3Set, tmp_path: Path) -> None:
    """Training would teach another beginning than is asked for."""
    tokenizer = AutoTokenizer.from_pretrained(golden.processor)
    opening = "{{- '<|im_start|>assistant\\n' -}}"
    assert opening in tokenizer.chat_template
    asked = tokenizer.chat_template.replace(opening, opening.replace("assistant\\n", "assistant\\n<think>\\n"))
    tokenizer.chat_template = asked
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(UserError, match="ends a prompt otherwise than an answer begins"):
        load_tokenizer(str(tmp_path))


def test_the_mixture_of_experts_is_refused_by_name(tmp_path: Path) -> None:
    Qwen3VLMoeConfig().save_pretrained(tmp_path)
    with pytest.raises(UserError, match="mixture-of-experts"):
        load_config(str(tmp_path))


def test_the_layout_is_the_towers(golden: Qwen3Set) -> None:
    layout = vision_layout(load_config(str(golden.weights)))
    assert (layout.patch_size, layout.cell, layout.window_size, layout.position_grid) == (16, 32, 0, 8)


def test_without_a_tower_no_merger_is_read(golden: Qwen3Set) -> None:
    model = load_student(replace(golden.model), torch.float32, 0, with_tower=False)
    assert model.model.visual is None
