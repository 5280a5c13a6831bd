"""What several test files need."""

from __future__ import annotations

import logging
import multiprocessing
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from ilvr_ds import launcher
from ilvr_ds.cli import main
from tests.recipes import RECIPE

if TYPE_CHECKING:
    from ilvr_ds.generation.loading import Reasoner
    from tests.golden_set import GoldenSet

LATENT_QUESTION = "How many remain? A) 1 B) 2"
LAUNCHER_VARIABLES = tuple(launcher.Place(0, 0, 1, "", 0).variables())
PLACE = {name: os.environ[name] for name in LAUNCHER_VARIABLES if name in os.environ}
"""Of the tests themselves"""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files whose tests may take longest come first, so that no worker is alone with one of them at the end."""
    longest: dict[Path, float] = {}
    for item in items:
        mark = item.get_closest_marker("timeout")
        longest[item.path] = max(longest.get(item.path, 0.0), float(mark.args[0]) if mark and mark.args else 0.0)
    items.sort(key=lambda item: -longest[item.path])


def pytest_sessionfinish() -> None:
    """A process that a failed test left behind would be waited for at the end, for ever."""
    for process in multiprocessing.active_children():
        process.kill()


@pytest.fixture(autouse=True)
def no_place_is_left_behind() -> Iterator[None]:
    """A command that runs in this process writes its place as a rank into the environment: the next test has none, also
    where it ran in a fixture of the module, before this one."""
    yield
    for name in LAUNCHER_VARIABLES:
        os.environ.pop(name, None)
    os.environ.update(PLACE)


@pytest.fixture(autouse=True)
def caplog_hears_us_alone(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """Undo what the command line does to the logger, for a test file that ran before; libraries log at any time."""
    logger = logging.getLogger("ilvr_ds")
    monkeypatch.setattr(logger, "handlers", [])
    monkeypatch.setattr(logger, "propagate", True)
    ours = logging.Filter(logger.name)
    caplog.handler.addFilter(ours)
    yield
    caplog.handler.removeFilter(ours)


@pytest.fixture(scope="session")
def demo_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo's material, smaller: `task`, `model`, and the packed `train` (64 samples) and `held_out` (16)."""
    return make_demo(tmp_path_factory.mktemp("demo-data") / "demo", "--train", "64", "--held-out", "16")


def make_demo(folder: Path, *options: str) -> Path:
    """Draw it with these options of `demo-data`, and pack it."""
    assert main(["demo-data", "--output", str(folder), *options]) == 0
    for split in ("train", "held_out"):
        source, output = str(folder / f"task/{split}.jsonl"), str(folder / split)
        model = f"model.path={folder / 'model'}"
        assert main(["pack", "--input", source, "--output", output, "--config", RECIPE, "--set", model]) == 0
    return folder


@pytest.fixture(scope="session")
def golden() -> GoldenSet:
    """The golden set of ILVR_GOLDEN, or the stored one. Imported late, because transformers is slow."""
    from tests.golden_set import golden_set

    return golden_set()


@pytest.fixture(scope="session")
def golden_model(golden: GoldenSet, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The golden model with its tokenizer in one folder, as a released checkpoint has them."""
    folder = tmp_path_factory.mktemp("golden") / "model"
    # without version 4's lists of added tokens, which transformers 5.17 cannot read beside a tokenizer of its own
    shutil.copytree(golden.folder / "processor", folder, ignore=shutil.ignore_patterns("added_tokens*", "special_tok*"))
    golden.encoder.tokenizer.save_pretrained(folder)  # the stored one lacks the latent tokens
    for name in ("config.json", "model.safetensors"):
        shutil.copy(golden.folder / name, folder)
    return folder


@pytest.fixture(scope="session")
def reasoner(golden_model: Path) -> Reasoner:
    import torch

    from ilvr_ds.generation.loading import load_reasoner

    return load_reasoner(str(golden_model), torch.device("cpu"), precision="fp32")


@pytest.fixture(scope="session")
def latent_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random model whose answer to LATENT_QUESTION about a picture begins with a segment."""
    from tests.evaluation.latent_model import build_latent_model

    return build_latent_model(tmp_path_factory.mktemp("latent-model"), LATENT_QUESTION)


@pytest.fixture(scope="session")
def latent_reasoner(latent_model: Path) -> Reasoner:
    import torch

    from ilvr_ds.generation.loading import load_reasoner

    return load_reasoner(str(latent_model), torch.device("cpu"), "fp32")
