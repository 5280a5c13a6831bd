"""The experiment on latents without its training: models of seeds, settings, and what is made of results."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from ilvr_ds.config import ModelConfig
from ilvr_ds.demo.material import write_demo_model
from ilvr_ds.model.student import load_student
from tests.bench import latents_data
from tests.bench.latents import Case
from tests.bench.latents_data import model_folder, model_spec, write_models


@pytest.fixture(scope="module", params=["qwen2_5_vl", "qwen3_vl"])
def written(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """Options, with the models of seeds 0 to 2 written."""
    output = tmp_path_factory.mktemp(request.param)
    options = SimpleNamespace(output=output, size="tiny", family=request.param, seeds=[2, 1])
    write_models(options, "1")
    return options


def test_each_seed_begins_from_weights_of_its_own_behind_the_same_tower(written: SimpleNamespace) -> None:
    """Catches seeds that vary nothing but the order of samples, and a tower that stored features do not fit."""
    students = [
        load_student(ModelConfig(path=str(model_folder(written, "1", seed))), torch.float32, 0).state_dict()
        for seed in range(3)
    ]
    first = students[0]
    for one, other in ((0, 1), (0, 2), (1, 2)):
        same = [name for name in first if torch.equal(students[one][name], students[other][name])]
        assert all(torch.equal(students[one][name], students[other][name]) for name in first if ".visual." in name)
        assert all(first[name].unique().numel() <= 2 for name in same if ".visual." not in name), "norms, biases"
        different = [name for name in first if name not in same]
        assert any("embed_tokens" in name for name in different) and any("down_proj" in name for name in different)
    for name, drawn in students[1].items():
        assert drawn.std() == pytest.approx(float(first[name].std()), rel=0.1, abs=1e-6), f"{name}: another scale"
    rms = [student["model.language_model.embed_tokens.weight"].square().mean().sqrt() for student in students]
    assert rms == pytest.approx([1.0] * 3, abs=1e-5)


def test_seed_0_is_the_model_that_it_was_and_all_share_tokenizer_and_settings(
    written: SimpleNamespace, tmp_path: Path
) -> None:
    write_demo_model(tmp_path / "model", model_spec("1"), "tiny", family=written.family)
    zero = model_folder(written, "1", 0)
    assert zero.name == "model-1"
    before, now = (load_file(folder / "model.safetensors") for folder in (tmp_path / "model", zero))
    assert before.keys() == now.keys() and all(torch.equal(before[name], now[name]) for name in before)
    files = {file.name for file in zero.iterdir()}
    for seed in (1, 2):
        folder = model_folder(written, "1", seed)
        assert {file.name for file in folder.iterdir()} == files
        differ = {name for name in files if (folder / name).read_bytes() != (zero / name).read_bytes()}
        assert differ == {"model.safetensors"}


def test_what_is_there_is_not_drawn_again_and_a_half_written_model_does_not_count(
    written: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a folder that holds the weights of seed 0 because its process was killed while it copied."""
    files = {seed: (model_folder(written, "1", seed) / "model.safetensors").stat().st_mtime_ns for seed in range(3)}
    write_models(written, "1")
    assert files == {s: (model_folder(written, "1", s) / "model.safetensors").stat().st_mtime_ns for s in range(3)}

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(latents_data, "redraw_language_model", killed)
    written.seeds = [3]
    with pytest.raises(KeyboardInterrupt):
        write_models(written, "1")
    assert not model_folder(written, "1", 3).exists()
    monkeypatch.undo()
    write_models(written, "1")
    assert (model_folder(written, "1", 3) / "model.safetensors").exists()


def test_a_case_trains_the_model_of_its_seed(tmp_path: Path) -> None:
    options = SimpleNamespace(
        output=tmp_path, size="tiny", family="qwen2_5_vl", seeds=[0, 1], workers=0, together=1, latents=2, lr=1.0,
        second_lr=1.0, steps=1, second_steps=1, batch=1, accum=1, precision="fp32", held_out=1, look_every=1,
        looks=False,
    )  # fmt: skip
    write_models(options, "1")
    paths = [Case(options, "changed", 1, seed).recipe("r", "1")["model"]["path"] for seed in (0, 1)]
    assert paths == [str(tmp_path / "model-1"), str(tmp_path / "model-1-s1")]
