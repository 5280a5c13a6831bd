"""`ilvr-ds plan` from its arguments to its lines and exit codes."""

from __future__ import annotations

import re
import shlex
from itertools import pairwise
from pathlib import Path

import pytest

from ilvr_ds.cli import main
from ilvr_ds.config import load_recipe
from ilvr_ds.data.plan import SamplePlan
from ilvr_ds.shipped import find_recipe
from tests.data.packing import make_dataset
from tests.full_disk import files_end_at
from tests.golden_set import golden_set
from tests.ranks import ROOT

SIZE = ["--gpus", "8", "--gpu-memory", "80"]


@pytest.fixture(autouse=True)
def at_home(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


def test_recipes_of_the_model_are_listed_with_whether_they_fit(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--model", "7b", *SIZE]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if ".yaml" in line]
    names = ["authors_7b", "comt_7b", "comt_7b_48gb-stage2", "comt_7b_48gb", "vsp_7b"]
    assert [line.split()[0] for line in lines] == [f"{name}.yaml" for name in names]
    assert all("  fits: " in line for line in lines), "as their comments say: 8 GPUs of 80 GB"
    assert main(["plan", "--model", "7b", "--gpus", "1", "--gpu-memory", "80"]) == 0
    assert capsys.readouterr().out.count("does not fit") == 3


def test_a_recipe_in_detail(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--config", "launch/recipes/comt_3b.yaml", *SIZE, "--set", "train.micro_batch_size=2"]) == 0
    text = capsys.readouterr().out
    assert "launch/recipes/comt_3b.yaml on 8 x 79.2 GiB (H100, a card of 80 GB)" in text and "\nfits: " in text
    for term in ("student's weights", "vision tower", "teacher's averages", "momentum update", "optim.name=adamw_8bit"):
        assert term in text


def test_a_step_has_the_recipes_samples_however_micro_batches_are_filled(capsys: pytest.CaptureFixture[str]) -> None:
    """Catches a step of three times six samples where the recipe has sixteen."""
    assert main(["plan", "--config", "launch/recipes/comt_3b.yaml", "--gpus", "2", "--gpu-memory", "80"]) == 0
    text = capsys.readouterr().out
    assert "a step of 32 samples" in text and "\ntrain.micro_batch_tokens=4096 " in text
    assert "train.micro_batch_size=1" not in text


def test_a_folder_is_read_for_its_sizes(capsys: pytest.CaptureFixture[str]) -> None:
    folder = str(golden_set().folder)
    assert main(["plan", "--model", folder, "--config", "launch/recipes/demo.yaml", *SIZE]) == 0
    assert "fits: 76" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--model", "8b", *SIZE],
            "plan: --model '8b' is none of 3b, 7b, 32b, 72b, qwen3vl_2b, qwen3vl_4b, qwen3vl_8b",
        ),
        (["--model", "7b", "--gpus", "1"], "plan: give --card NAME"),
        (["--model", "7b", "--card", "4080"], "--card 4080: not known"),
        (["--model", "7b", *SIZE, "--write", "README.md"], "plan: --write README.md: it exists; give another name"),
        (["--model", "7b", "--card", "4090", "--write", "no/such/folder.yaml"], "plan: --write"),
        (["--model", "7b", "--card", "4090", "--host-memory", "0"], "plan: --gpus must be 1 or more"),
        ([*SIZE], "plan: give --model"),
        (["--model", "7b", "--gpus", "0", "--gpu-memory", "80"], "plan: --gpus must be 1 or more"),
        (["--model", "7b", "--gpus", "1", "--gpu-memory", "nan"], "plan: --gpus must be 1 or more"),
        (["--model", "7b", *SIZE, "--chip", "H300"], "plan: --chip H300 is not known; valid: H100 PCIe"),
        (["--model", "7b", *SIZE, "--tokens", "0"], "plan: --tokens and --labels must be 1 or more"),
        (["--config", "none.yaml", *SIZE], "none.yaml: cannot read the recipe"),
        (
            ["--config", "launch/recipes/comt_3b.yaml", "--gpus", "3", "--gpu-memory", "80"],
            "launch/recipes/comt_3b.yaml: data.lanes: 16 lanes cannot be shared by 3 ranks",
        ),
        (
            ["--model", "3b", "--card", "H200", "--set", "train.grad_accum_steps=3", "--set", "data.lanes=16"],
            "plan: --set data.lanes=16: 1 x train.micro_batch_size 4 x train.grad_accum_steps 3 = 12 samples a step",
        ),
        (["--model", "7b", *SIZE, "--set", "optim.nme=x"], "--set optim.nme=x: unknown key"),
        (
            ["--config", "launch/recipes/comt_3b.yaml", *SIZE, "--set", "model.lora_targets=[qproj]"],
            "launch/recipes/comt_3b.yaml: model.lora_targets: no linear layer 'qproj'; did you mean 'q_proj'?",
        ),
    ],
)
def test_mistakes_are_one_line_and_exit_2(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", *arguments]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith(f"ilvr-ds: error: {message}")


def command_in(text: str) -> list[str]:
    """The arguments of the command that a plan prints."""
    [line] = [line for line in text.splitlines() if "--config" in line and line.startswith("  ")]
    return shlex.split(line)


def needs_gib(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> float:
    """What a plan in detail says that a recipe needs."""
    assert main(["plan", *arguments]) == 0
    found = re.search(r"at the peak; ([\d.]+) with CUDA", capsys.readouterr().out)
    assert found is not None
    return float(found[1])


@pytest.mark.parametrize(
    ("arguments", "samples"),
    [
        (["--config", "comt_7b", "--set", "train.micro_batch_size=2", "--set", "data.packing=false",
          "--set", "train.micro_batch_tokens=0"], 64),
        (["--model", "3b", "--set", "train.grad_accum_steps=3"], 12),
    ],
)  # fmt: skip
def test_what_is_set_keeps_the_samples_of_a_step(
    arguments: list[str], samples: int, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches one half of a pair that is changed where the other stays, and a command that training refuses."""
    assert main(["plan", *arguments, "--card", "H200"]) == 0
    words = command_in(capsys.readouterr().out)
    sets = [text for word, text in pairwise(words) if word == "--set"]
    name = words[words.index("--config") + 1]
    recipe = load_recipe(find_recipe(Path(name)), sets)
    assert recipe.train.micro_batch_size * recipe.train.grad_accum_steps == samples
    assert samples % recipe.data.lanes == 0, recipe.data.lanes


def test_what_fits_is_a_command_that_fits(capsys: pytest.CaptureFixture[str]) -> None:
    """Catches the answer that 76.9 GiB do not fit a card of 24 GB, and no word on what does."""
    assert main(["plan", "--model", "3b", "--card", "RTX 4090"]) == 0
    text = capsys.readouterr().out
    assert "3b on 1 x 23.5 GiB (RTX 4090)" in text and "what fits with a margin of 3%, the fastest first" in text
    assert "\n1  adapters of rank 64" in text
    command = command_in(text)
    assert command[:4] == ["ilvr-ds", "train", "--config", "comt_3b"]
    needed = needs_gib(["--config", "comt_3b", "--card", "RTX 4090", *command[4:]], capsys)
    assert 0 < needed <= 0.97 * 23.5 + 0.05


@pytest.mark.parametrize("overrides", [[], ["--set", "train.stage=2"], ["--set", "run.name=mine"]])
def test_what_fits_is_written_as_a_recipe(
    overrides: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "mine.yaml"
    arguments = ["--model", "3b", "--card", "3090", *overrides]
    assert main(["plan", *arguments, "--write", str(file)]) == 0
    command = command_in(capsys.readouterr().out)
    sets = [text for name, text in pairwise(command) if name == "--set"]
    written = load_recipe(file)
    assert written == load_recipe(ROOT / "launch/recipes/comt_3b.yaml", sets)
    assert needs_gib(["--config", str(file), "--card", "3090"], capsys) <= 0.97 * 23.5 + 0.05
    assert main(["plan", *arguments, "--write", str(file)]) == 2, "nothing is overwritten"
    with files_end_at(100):
        assert main(["plan", *arguments, "--write", str(tmp_path / "full.yaml")]) == 2
    assert [path.name for path in tmp_path.iterdir()] == ["mine.yaml"], "nor half written"


def test_seven_billions_on_one_card_keep_the_samples_of_a_step(capsys: pytest.CaptureFixture[str]) -> None:
    """Catches a recipe of 64 lanes on one GPU, whose 8 samples a step no start accepts."""
    assert main(["plan", "--model", "7b", "--card", "A6000"]) == 0
    sets = [text for name, text in pairwise(command_in(capsys.readouterr().out)) if name == "--set"]
    recipe = load_recipe(ROOT / "launch/recipes/comt_7b.yaml", sets)
    batch = recipe.train.micro_batch_size * recipe.train.grad_accum_steps
    assert batch == recipe.data.lanes == 64
    SamplePlan((10_000,), 0, recipe.data.lanes, batch).check_world(1)


def test_what_is_set_stays(capsys: pytest.CaptureFixture[str]) -> None:
    sizes = ["--model", "3b", "--card", "H100", "--set", "model.activation_checkpointing=full"]
    assert main(["plan", *sizes]) == 0
    text = capsys.readouterr().out.partition("what fits")[2]
    assert "full checkpointing" in text and "no checkpointing" not in text and "selective" not in text
    assert main(["plan", "--model", "3b", "--card", "4090", "--set", "model.lora_rank=0"]) == 0
    text = capsys.readouterr().out
    assert "adapters" not in text.partition("what fits")[2]


def test_memory_of_the_host_counts_where_it_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    """Catches AdamW on a host that has no room for it."""
    sizes = ["--model", "3b", "--card", "4090", "--set", "model.lora_rank=0"]
    assert main(["plan", *sizes]) == 0
    assert "AdamW on the host" in capsys.readouterr().out
    assert main(["plan", *sizes, "--host-memory", "32"]) == 0
    assert "nothing fits with a margin of 3%: the least, all weights" in capsys.readouterr().out


def test_nothing_that_fits_is_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "mine.yaml"
    assert main(["plan", "--model", "72b", "--card", "3090", "--write", str(file)]) == 2
    assert "plan: --write: nothing fits with a margin of 3%: the least, adapters" in capsys.readouterr().err
    assert not file.exists()


@pytest.mark.parametrize(
    ("model", "hub_name"),
    [
        ("32b", "Qwen/Qwen2.5-VL-32B-Instruct"),
        ("Qwen/Qwen2.5-VL-32B-Instruct", "Qwen/Qwen2.5-VL-32B-Instruct"),
        ("qwen3vl_2b", "Qwen/Qwen3-VL-2B-Instruct"),
        ("Qwen/Qwen3-VL-32B-Instruct", "Qwen/Qwen3-VL-32B-Instruct"),
    ],
)
def test_models_without_recipes_are_known_by_name(
    model: str, hub_name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", "--model", model, "--card", "H100", "--gpus", "8"]) == 0
    command = command_in(capsys.readouterr().out)
    assert command[:5] == ["deepspeed", "--num_gpus", "8", "launch/train.sh", "--config"]
    assert f"model.path={hub_name}" in command


@pytest.mark.parametrize("model", ["qwen3vl_4b", "Qwen/Qwen3-VL-8B-Instruct"])
def test_a_model_is_planned_from_its_own_recipe(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Catches a Qwen3-VL whose settings are those of a Qwen2.5-VL of another size."""
    assert main(["plan", "--model", model, "--card", "H100", "--gpus", "8"]) == 0
    text = capsys.readouterr().out
    command = command_in(text)
    name = "comt_qwen3vl_4b" if "4b" in model else "comt_qwen3vl_8b"
    assert command[5] == name and not any("model.path" in part for part in command)
    assert f"{name}.yaml" in text


def test_a_configuration_may_be_a_file(capsys: pytest.CaptureFixture[str]) -> None:
    file = golden_set().folder / "config.json"
    assert main(["plan", "--model", str(file), "--card", "3090"]) == 0
    assert f"model.path={file.parent}" in command_in(capsys.readouterr().out)


@pytest.mark.parametrize("size", [["--card", "MI300X"], ["--gpu-memory", "24"]])
def test_no_time_is_given_for_a_chip_without_rates(size: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """Catches a card of 24 GB that counts as an H100."""
    assert main(["plan", "--model", "3b", *size]) == 0
    text = capsys.readouterr().out
    assert "unknown: time not given" in text and "     unknown  fits" in text


def test_recipes_are_found_from_anywhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["plan", "--model", "7b", *SIZE]) == 0
    assert capsys.readouterr().out.count("_7b.yaml") == 3
    assert main(["plan", "--config", "comt_7b", *SIZE]) == 0
    assert "comt_7b.yaml on 8 x 79.2 GiB" in capsys.readouterr().out


def test_without_recipes_there_is_nothing_to_say(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--model", "7b", *SIZE, "--set", "model.path=elsewhere"]) == 2
    assert "no recipe for 7b among authors_7b, comt_3b, " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("gpu_memory", "words"),
    [
        ("80", "79.2 GiB (H100, a card of 80 GB)"),
        ("79", "79 GiB (H100)"),
        ("141", "139.8 GiB (H200, a card of 141 GB)"),
    ],
)
def test_a_size_may_be_what_a_card_is_named_by(gpu_memory: str, words: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Catches a plan with 0.8 GiB that no card of 80 GB has."""
    assert main(["plan", "--model", "7b", "--gpus", "8", "--gpu-memory", gpu_memory]) == 0
    assert f"7b on 8 x {words}; " in capsys.readouterr().out


def test_what_a_mixture_takes_of_each_set_is_said_where_they_can_be_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_dataset(tmp_path / "a", samples=10)
    make_dataset(tmp_path / "b", samples=30)
    settings = ["train.max_steps=1", "data.lanes=8", "train.micro_batch_size=1", "train.grad_accum_steps=1"]
    words = [word for setting in settings for word in ("--set", setting)]

    def planned(shards: str) -> list[str]:
        mixture = ["--set", f"data.shards={shards}", "--set", "data.eval_shards=null"]
        assert main(["plan", "--config", "launch/recipes/comt_3b.yaml", *SIZE, *words, *mixture]) == 0
        return capsys.readouterr().out.splitlines()

    paths = f"[{{path: {tmp_path}/a, weight: 3}}, {{path: {tmp_path}/b, weight: 1}}]"
    assert planned(paths)[-3:] == [
        "the mixture, 5 steps an epoch:",
        "  a: 6 samples in 1 step (75.0% of the run), 0.6 passes over its 10; 4 are never seen",
        "  b: 2 samples in 1 step (25.0% of the run), 0.0667 passes over its 30; 28 are never seen",
    ]
    assert planned(f"[{tmp_path}/a, {tmp_path}/gone]")[-1].startswith("the mixture was not looked at: ")
