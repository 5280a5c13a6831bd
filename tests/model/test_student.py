"""Loading a student: what is refused, how the vocabulary grows, which weights are trained, the tower apart."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Qwen2Config

from ilvr_ds.errors import UserError
from ilvr_ds.model.student import (
    ROW_MULTIPLE,
    build_text_model,
    detach_tower,
    load_config,
    load_student,
    prepare_student,
    vision_layout,
)
from tests.golden_set import GoldenSet

FP32 = torch.float32


def load(golden: GoldenSet, num_tokens: int = 0, **settings: Any) -> Any:
    model = load_student(replace(golden.model, **settings), FP32, num_tokens)
    prepare_student(model, replace(golden.model, **settings))
    return model


@contextmanager
def nothing_to_gather(parameters: list[torch.nn.Parameter]) -> Iterator[None]:
    yield


def test_a_missing_model_is_a_users_mistake(tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        load_config(str(tmp_path / "nowhere"))
    assert str(caught.value).startswith(f"model.path: no model at '{tmp_path}/nowhere' (")
    assert "\n" not in str(caught.value)


def test_another_model_is_a_users_mistake(tmp_path: Path) -> None:
    Qwen2Config().save_pretrained(tmp_path)
    with pytest.raises(UserError, match="holds a qwen2 model; expected qwen2_5_vl"):
        load_config(str(tmp_path))


def test_sliding_window_attention_is_refused(tmp_path: Path, golden: GoldenSet) -> None:
    """A ready-made mask would switch it off without a word."""
    config = json.loads((golden.folder / "config.json").read_text())
    changes = {"use_sliding_window": True, "sliding_window": 64, "max_window_layers": 1}
    (tmp_path / "config.json").write_text(json.dumps(config | changes))
    with pytest.raises(UserError, match="sliding-window attention"):
        load_config(str(tmp_path))


def test_the_layout_is_the_towers(golden: GoldenSet) -> None:
    layout = vision_layout(load_config(str(golden.folder)))
    assert (layout.patch_size, layout.merge_size, layout.window_size, layout.cell) == (14, 2, 112, 28)


@pytest.mark.parametrize("num_tokens", [0, 428])
def test_an_embedding_with_room_keeps_its_rows(num_tokens: int, golden: GoldenSet, stock: Any) -> None:
    model = load(golden, num_tokens)
    assert model.get_input_embeddings().weight.shape[0] == model.lm_head.weight.shape[0] == 428
    assert torch.equal(model.get_input_embeddings().weight, stock.get_input_embeddings().weight)


def test_an_embedding_without_room_grows_to_a_round_number_of_rows(golden: GoldenSet, stock: Any) -> None:
    """Both tables, the old rows untouched; the configuration says the new size, which exports read."""
    model = load(golden, 429)
    assert ROW_MULTIPLE == 64 and model.config.text_config.vocab_size == 448
    for grown, before in [(model.get_input_embeddings(), stock.get_input_embeddings()), (model.lm_head, stock.lm_head)]:
        assert grown.weight.shape == (448, 64)
        assert torch.equal(grown.weight[:428], before.weight)
        assert grown.weight.isfinite().all() and grown.weight.requires_grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_come_in_the_precision_that_is_asked_for(dtype: torch.dtype, golden: GoldenSet, tmp_path: Path) -> None:
    """Whatever the configuration says: random weights used to come in its own."""
    folder = shutil.copytree(golden.model.path, tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    for part in (config, config["vision_config"]):
        part["dtype"] = "float32"
    (folder / "config.json").write_text(json.dumps(config))
    for random_init in (False, True):
        model = load_student(replace(golden.model, path=str(folder), random_init=random_init), dtype, 0)
        assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    assert torch.get_default_dtype() == torch.float32, "the default is put back"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("lacking", r"lacks 1 weights, the first model\.language_model\.layers\.0\.self_attn\.q_proj\.weight"),
        ("pointer", r"the weights at '.*' cannot be read"),
        ("none", r"the weights at '.*' cannot be read"),
    ],
)
def test_weights_that_are_not_all_there_are_a_mistake(
    damage: str, message: str, golden: GoldenSet, tmp_path: Path
) -> None:
    """transformers draws what is missing at random and says so where nobody looks; a pointer is what git leaves where
    large files were not fetched."""
    folder = shutil.copytree(golden.model.path, tmp_path / "model")
    file = folder / "model.safetensors"
    if damage == "lacking":
        weights = load_file(file)
        del weights[next(name for name in weights if name.endswith("layers.0.self_attn.q_proj.weight"))]
        save_file(weights, file, metadata={"format": "pt"})
    elif damage == "pointer":
        file.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    else:
        file.unlink()
    with pytest.raises(UserError, match=rf"model\.path: .*{message}"):
        load_student(replace(golden.model, path=str(folder)), torch.float32, 0)


@pytest.mark.parametrize("method", ["awq", "gptq", "bitsandbytes", None])
def test_a_quantised_base_is_a_mistake(method: str | None, golden: GoldenSet, tmp_path: Path) -> None:
    folder = shutil.copytree(golden.model.path, tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"bits": 4} if method is None else {"quant_method": method, "bits": 4}
    (folder / "config.json").write_text(json.dumps(config))
    words = rf"is quantised \({method or 'unknown method'}\); take the original weights, .*model\.lora_base: nf4"
    with pytest.raises(UserError, match=words):
        load_student(replace(golden.model, path=str(folder)), torch.float32, 0)


def test_random_weights_are_not_the_stored_ones(golden: GoldenSet, stock: Any) -> None:
    model = load(golden, 0, random_init=True)
    assert model.lm_head.weight.shape == stock.lm_head.weight.shape
    assert not torch.allclose(model.lm_head.weight, stock.lm_head.weight)


def test_all_weights_are_trained_without_adapters(golden: GoldenSet) -> None:
    model = load(golden)
    assert all(parameter.requires_grad for parameter in model.parameters()) and model.training
    assert model.config.use_cache is False


def test_with_adapters_only_they_are_trained(golden: GoldenSet) -> None:
    model = load(golden, lora_rank=4, lora_targets=("q_proj", "down_proj"))
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    adapters = [name for name, _ in model.named_parameters() if ".lora_A." in name or ".lora_B." in name]
    assert trained == adapters and len(adapters) == 3 * 2 * 2, "3 layers, 2 targets, A and B"
    assert all("language_model.layers" in name for name in trained), "no adapters in the tower, which names its own so"


@pytest.mark.parametrize("checkpointing", ["none", "full", "selective"])
def test_checkpointing_runs_each_layer_again_in_the_backward_pass(checkpointing: str, golden: GoldenSet) -> None:
    model = load(golden, activation_checkpointing=checkpointing)
    language_model, calls = model.model.language_model, []
    language_model.layers[1].mlp.register_forward_pre_hook(lambda *_: calls.append(1))
    ids = torch.from_numpy(golden.encoded[5].input_ids)[None]
    hidden = language_model(input_ids=ids, use_cache=False).last_hidden_state
    assert len(calls) == 1
    hidden.sum().backward()
    assert len(calls) == 1 + (checkpointing != "none")
    assert language_model.embed_tokens.weight.grad is not None


def test_the_detached_tower_is_whole_frozen_and_gone_from_the_model(golden: GoldenSet, stock: Any) -> None:
    model = load(golden)
    expected = dict(stock.model.visual.named_parameters())
    tower = detach_tower(model, nothing_to_gather)
    assert model.model.visual is None
    assert not any("visual" in name for name, _ in model.named_parameters())
    parameters = dict(tower.named_parameters())
    assert parameters.keys() == expected.keys()
    assert all(torch.equal(parameters[name], expected[name]) for name in expected)
    assert not any(parameter.requires_grad for parameter in parameters.values())
    assert not any(module.training for module in tower.modules())


def test_the_tower_is_copied_while_its_weights_are_gathered(golden: GoldenSet, stock: Any) -> None:
    """ZeRO-3 takes gathered weights back when the block ends: the tower must hold copies of its own, of all of them."""
    model = load(golden)

    @contextmanager
    def gather(parameters: list[torch.nn.Parameter]) -> Iterator[None]:
        yield
        for parameter in parameters:
            parameter.data.zero_()
            parameter.data = torch.empty(0)

    tower = detach_tower(model, gather)
    for parameter, expected in zip(tower.parameters(), stock.model.visual.parameters(), strict=True):
        assert torch.equal(parameter, expected)


def test_the_teachers_network_has_the_students_parameters(golden: GoldenSet) -> None:
    """Parameter by parameter: the momentum update pairs their shards."""
    model = load(golden, 429)
    teacher = build_text_model(model.config.text_config, "sdpa")
    shapes = [[(n, p.shape) for n, p in m.named_parameters()] for m in (teacher, model.model.language_model)]
    assert shapes[0] == shapes[1]
