"""What can be wrong with the benchmark of a step before it runs: its work, its cases, its table."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from ilvr_ds.config import recipe_from_dict
from ilvr_ds.config.data_sections import DataConfig
from ilvr_ds.data.check import check_sample
from ilvr_ds.data.images import ImageEncoder
from ilvr_ds.data.sample import LatentStep, TextStep
from ilvr_ds.data.tokens import load_tokenizer
from ilvr_ds.engine.settings import read_deepspeed_json
from ilvr_ds.model.student import load_config
from ilvr_ds.planning.geometry import KNOWN, geometry_of
from tests.bench import step
from tests.bench.noise import SIZES, draw_samples, sizes_of, write_geometry
from tests.bench.step import _options, case_of
from tests.bench.step_table import SHARES, render
from tests.bench.syncs import unknown


def words_of(sample: Any) -> int:
    texts = [sample.question, *(step.content for step in sample.steps if isinstance(step, TextStep))]
    return sum(len(text.split()) for text in texts)


def test_mixed_work_is_spread_wide() -> None:
    """Few samples, so small images: lengths, numbers of images and segments vary as the benchmark says."""
    samples = list(draw_samples("mixed", SIZES["demo"], 60))
    for sample in samples:
        check_sample(sample)
    segments = {sum(isinstance(step, LatentStep) for step in sample.steps) for sample in samples}
    assert {len(sample.input_images) for sample in samples} == {1, 2, 3} and segments >= {1, 2, 3, 4, 5, 6}
    assert max(map(words_of, samples)) > 4 * min(map(words_of, samples))
    assert samples == list(draw_samples("mixed", SIZES["demo"], 60))


def test_comt_work_is_all_alike() -> None:
    sizes = SIZES["real"]
    assert sizes.input_side**2 == 576 and sizes.helper_side**2 == 256
    (sample,) = draw_samples("comt", SIZES["demo"], 1)
    assert len(sample.helper_images) == 3 and words_of(sample) == 12 + 4 * 8


@pytest.mark.parametrize("name", KNOWN)
def test_a_model_folder_has_the_sizes_of_the_release(name: str, tmp_path: Path) -> None:
    """Catches a benchmark of some other model under its name, and one whose image tokens the collator does not find."""
    write_geometry(tmp_path / "model", name)
    config = load_config(str(tmp_path / "model"))
    assert geometry_of(config) == KNOWN[name]
    tokenizer, special = load_tokenizer(str(tmp_path / "model"))
    assert config.image_token_id == special.image_pad and config.text_config.eos_token_id == tokenizer.eos_token_id
    assert not list((tmp_path / "model").glob("*.safetensors"))


@pytest.mark.parametrize("geometry", ["7b", "qwen3vl_8b"])
def test_work_has_as_many_tokens_for_every_family(geometry: str, tmp_path: Path) -> None:
    write_geometry(tmp_path / "model", geometry)
    images = ImageEncoder(str(tmp_path / "model"), DataConfig().max_image_pixels)
    (sample,) = draw_samples("comt", sizes_of(geometry), 1, images.cell)
    assert images.grid(sample.input_images[0]) == (48, 48)
    assert [images.grid(data) for data in sample.helper_images] == [(32, 32)] * 3


def options(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> Any:
    monkeypatch.setattr(sys, "argv", ["step", *arguments])
    return _options()


@pytest.mark.parametrize(
    "name", ["comt", "mixed+features", "comt+selective+8bit+offload-none", "comt+full", "comt+lora+nf4"]
)
def test_cases_are_recipes(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = case_of(name, 2, options(monkeypatch, "--cases", name, "--set", "optim.lr=1e-3"), Path("folder"))
    recipe = recipe_from_dict(case.settings)
    assert recipe.optim.lr == 1e-3 and recipe.deepspeed.config == "ds_configs/zero3.json"
    assert (recipe.data.features is not None) == case.has_features == ("features" in name)
    assert recipe.teacher.offload == ("none" if "offload-none" in name else "cpu")


@pytest.mark.parametrize("choice", ["cpu-adam", "zero1", "zero2", "kept-weights"])
def test_choices_of_deepspeed_name_files_that_are_there(choice: str, monkeypatch: pytest.MonkeyPatch) -> None:
    name = f"comt+{choice}"
    recipe = recipe_from_dict(case_of(name, 2, options(monkeypatch, "--cases", name), Path("folder")).settings)
    settings = read_deepspeed_json(recipe.deepspeed.config)["zero_optimization"]
    assert ("offload_optimizer" in settings) == (choice == "cpu-adam") == (recipe.optim.name == "cpu_adam")


def test_a_case_that_fails_costs_no_other_its_row(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    def measure(case: Any, *_: Any) -> dict[str, Any]:
        if "full" in case.name:
            raise subprocess.CalledProcessError(7, "step_run")
        return {"syncs": {}}

    monkeypatch.setattr(step, "_measure", measure)
    monkeypatch.setattr(step, "render", lambda results: [f"{len(results)} rows"])
    monkeypatch.setattr(sys, "argv", ["step", "--cases", "comt+full,comt", "--folder", str(tmp_path)])
    with pytest.raises(SystemExit) as end:
        step.main()
    assert end.value.code == 1
    assert capsys.readouterr().out.splitlines() == ["1 rows", "comt+full on 1 rank failed (exit code 7)"]


@pytest.mark.parametrize("arguments", [["--cases", "comic"], ["--cases", "comt+fast"], ["--cpu", "--check-syncs"]])
def test_mistakes_end_before_anything_runs(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SystemExit) as end:
        options(monkeypatch, *arguments)
    assert end.value.code == 2


def test_the_table_has_medians_spreads_and_scaling(monkeypatch: pytest.MonkeyPatch) -> None:
    def result(ranks: int, seconds: list[float]) -> dict[str, Any]:
        case = case_of("comt", ranks, options(monkeypatch), Path("folder"))
        interval = {f"speed/share/{name}": 1 / len(SHARES) for name in SHARES} | {"data/padding": 0.25}
        rates = [
            {"speed/s_per_step": s, "speed/samples_per_s": 8 * ranks / s, "speed/tokens_per_s": 1e4} for s in seconds
        ]
        more = {"speed/mfu": 0.4, "speed/mfu_matmul": 0.35, "memory/peak_device_gib": 60.0}
        return {
            "case": {**vars(case), "check_syncs": True},
            "intervals": [interval | rate | more for rate in rates],
            "planned_gib": 60.6,
            "samples_a_step": 8,
            "ranks": ranks,
            "loader_samples_per_s": 40.0,
            "syncs": {"/x/deepspeed/a.py:1 fetch": 4, "/x/ilvr_ds/distill/ema.py:9 wait": 2},
            "environment": {
                "versions": {"torch": "2"}, "git_commit": "0" * 40, "git_dirty": True, "cuda": None,
                "ranks": [{"device": "X"}],
            },
        }  # fmt: skip

    text = "\n".join(render([result(1, [1.0, 0.8, 1.6]), result(2, [1.25, 1.25, 1.25])]))
    assert "125.0 (100.0 to 200.0)" in text and "| 80% |" in text and "| 40.0% | 35.0% |" in text
    assert "| 60.0 | 60.6 (+1.0%) |" in text
    assert "40 samples/s, 5.0x" in text and "25.0%" in text and "commit 000000000000 (changed)" in text
    assert "comt: no unexpected host synchronisations" in text and "2 a step in /x/deepspeed" in text


def test_only_deepspeed_and_the_wait_for_the_update_may_synchronise() -> None:
    places = {"/s/deepspeed/a.py:1 fetch": 4, "/x/ilvr_ds/distill/ema.py:9 wait": 7}
    assert not unknown(places)
    mistakes = {
        "/x/ilvr_ds/distill/ema.py:8 update": 1,
        "/x/ilvr_ds/model/vision.py:3 wait": 1,
        "an unknown place": 1,
    }
    assert unknown({**places, **mistakes}) == mistakes
