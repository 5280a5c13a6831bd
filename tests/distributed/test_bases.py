"""What adapters stand on, and the tower, stay the same when a run goes on."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from ilvr_ds.errors import UserError
from ilvr_ds.evaluation.export import export
from tests.distributed.test_runs import assert_same_losses, losses, overrides
from tests.ranks import ROOT, run_ranks
from tests.recipes import RECIPE

WORKER = "tests.distributed.workers_run:"
ZERO2 = f"deepspeed.config={ROOT / 'ds_configs/zero2.json'}"
LORA = "model.lora_rank=4"


def change(folder: Path, part: str) -> None:
    """Other weights in a model's folder, of those with `part` in their names."""
    (file,) = folder.glob("*.safetensors")
    torch.manual_seed(0)
    noisy = {name: w + 0.05 * torch.randn_like(w) if part in name else w for name, w in load_file(file).items()}
    save_file(noisy, file, metadata={"format": "pt"})


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory: pytest.TempPathFactory, demo_folder: Path) -> Callable[..., list[str]]:
    """Settings of a run whose weights, the base under its adapters too, are those of a run of another model.path."""
    folder = tmp_path_factory.mktemp("bases")
    settings = overrides(folder / "first", demo_folder, train__max_steps=1)
    run_ranks(WORKER + "train", 2, folder / "ranks", recipe=RECIPE, overrides=[*settings, LORA])
    shutil.copytree(demo_folder / "model", folder / "other")
    change(folder / "other", "layers")

    def settings_of(run: Path, **changes: object) -> list[str]:
        start = {"model__path": folder / "other", "model__init_from": folder / "first/demo"}
        return [*overrides(run, demo_folder, train__max_steps=4, **start, **changes), LORA]

    return settings_of


@pytest.mark.drill
@pytest.mark.parametrize("saved", ["zero3", "zero2"])
def test_a_run_goes_on_with_the_base_that_its_adapters_stand_on(
    tmp_path: Path, elsewhere: Callable[..., list[str]], saved: str
) -> None:
    """The judge is the run in one piece. Catches a teacher, and under another ZeRO stage or number of ranks a student,
    on the frozen weights at model.path."""
    first = [ZERO2] * (saved == "zero2")
    run_ranks(WORKER + "train", 2, tmp_path / "1", recipe=RECIPE, overrides=[*elsewhere(tmp_path / "whole"), *first])
    arguments = {"recipe": RECIPE, "overrides": [*elsewhere(tmp_path / "part"), *first]}
    run_ranks(WORKER + "train", 2, tmp_path / "2", **arguments, stop_after=2)
    shutil.copytree(tmp_path / "part", tmp_path / "resharded")
    run_ranks(WORKER + "train", 2, tmp_path / "3", **arguments)
    other = [] if first else [ZERO2]
    settings = [*elsewhere(tmp_path / "resharded", train__grad_accum_steps=4), *other]
    run_ranks(WORKER + "train", 1, tmp_path / "4", recipe=RECIPE, overrides=settings)
    for name in ("part", "resharded"):
        assert_same_losses(losses(tmp_path / name), losses(tmp_path / "whole"))


@pytest.mark.parametrize(
    ("part", "adapters", "what"),
    [
        ("visual", [], "vision tower"),
        ("layers", [LORA, "model.lora_base=nf4"], "layers in 4 bits"),
    ],
)
def test_frozen_weights_that_no_checkpoint_holds_must_be_the_same(
    tmp_path: Path, demo_folder: Path, part: str, adapters: list[str], what: str
) -> None:
    """The folder at model.path holds others when the run goes on, or when it is exported."""
    model = shutil.copytree(demo_folder / "model", tmp_path / "model")
    settings = [*overrides(tmp_path / "run", demo_folder, model__path=model, train__max_steps=2), *adapters]
    arguments = {"recipe": RECIPE, "overrides": settings}
    run_ranks(WORKER + "train", 2, tmp_path / "1", **arguments, stop_after=1)
    change(model, part)
    messages = set(run_ranks(WORKER + "mistake", 2, tmp_path / "2", **arguments))
    checkpoint = tmp_path / "run/demo/checkpoints/step-00000001"
    message = (
        f"{checkpoint}: made with another {what} than {model} holds now, and checkpoints do not hold it: "
        "give the model of then as model.path"
    )
    assert messages == {message}
    with pytest.raises(UserError, match=re.escape(message)):
        export(checkpoint, tmp_path / "exported", "merge", None, overwrite=False)
