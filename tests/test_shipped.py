"""Recipes and settings are found by name, in a checkout and in an installed package."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from ilvr_ds import shipped
from ilvr_ds.errors import UserError
from ilvr_ds.shipped import find_recipe
from tests.ranks import ROOT


def test_a_checkouts_files_have_names() -> None:
    assert shipped.recipes()["comt_7b"] == ROOT / "launch/recipes/comt_7b.yaml"
    assert shipped.deepspeed_files()["zero2"] == ROOT / "ds_configs/zero2.json"
    assert len(shipped.recipes()) == len(list((ROOT / "launch/recipes").iterdir()))


def test_a_recipe_is_a_file_or_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert find_recipe(Path("demo")) == ROOT / "launch/recipes/demo.yaml"
    assert find_recipe(Path("none.yaml")) == Path("none.yaml"), "whoever reads it says that it is not there"
    Path("demo").write_text("a recipe of one's own")
    assert find_recipe(Path("demo")) == Path("demo")
    with pytest.raises(UserError, match=r"--config comt_8b: neither a file nor the name of a recipe; did you mean"):
        find_recipe(Path("comt_8b"))


@pytest.mark.drill
@pytest.mark.timeout(600)
def test_an_installed_package_brings_them(tmp_path: Path) -> None:
    """Catches files that setup.py leaves behind; nothing of the checkout may be needed."""
    source, site = tmp_path / "source", tmp_path / "site"
    shutil.copytree(
        ROOT, source, ignore=shutil.ignore_patterns(".git", ".venv", "outputs", "build", "*.egg-info", "tests")
    )
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-build-isolation", "--target", str(site)]
    subprocess.run([*pip, str(source)], check=True, timeout=300)
    shutil.rmtree(source)

    def ilvr_ds(*arguments: str) -> str:
        command = [sys.executable, "-m", "ilvr_ds.cli", *arguments]
        place = {"PYTHONPATH": str(site), "PATH": str(Path(sys.executable).parent), "HOME": str(tmp_path)}
        ended = subprocess.run(
            command, cwd=tmp_path, env=place, capture_output=True, text=True, timeout=200, check=False
        )
        assert ended.returncode == 0, ended.stderr
        return ended.stdout

    assert (site / "ilvr_ds/recipes/comt_7b.yaml").is_file() and (site / "ilvr_ds/csrc").is_dir()
    ilvr_ds("demo-data", "--trained", "--train", "1", "--held-out", "1", "--output", "demo")
    assert (tmp_path / "demo/model/model.safetensors.index.json").is_file()
    gpus = ("--gpus", "8", "--gpu-memory", "80")
    assert ilvr_ds("plan", "--model", "7b", *gpus).count("_7b.yaml") == 3
    assert "comt_7b.yaml on 8 x 79.2 GiB" in ilvr_ds("plan", "--config", "comt_7b", *gpus)
    shutil.copy(site / "ilvr_ds/recipes/comt_7b.yaml", tmp_path / "mine.yaml")
    assert "mine.yaml on 8 x 79.2 GiB" in ilvr_ds("plan", "--config", "mine.yaml", *gpus)
