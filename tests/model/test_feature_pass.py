"""`ilvr-ds encode`: its rows are the tower's, a killed one goes on, parts add up to the whole."""

from __future__ import annotations

import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ilvr_ds.cli import main
from ilvr_ds.config import ModelConfig
from ilvr_ds.data.features import open_features
from ilvr_ds.data.images import ImageEncoder, attention_bookkeeping
from ilvr_ds.data.reader import ShardReader
from ilvr_ds.data.shards import open_dataset
from ilvr_ds.data.window import ImageBatch
from ilvr_ds.errors import UserError
from ilvr_ds.model import feature_pass
from ilvr_ds.model.feature_pass import EncodeSettings, encode, parse_part
from ilvr_ds.model.student import DTYPES, load_config, load_student, vision_layout
from ilvr_ds.model.tower import load_tower, tower_identity
from ilvr_ds.model.vision import VisionTower
from tests.data.packing import contents, make_sample, serve, write_shards
from tests.model.conftest import tower_of
from tests.ranks import ROOT

CPU = torch.device("cpu")
PIXELS = 1_003_520


@pytest.fixture(scope="module")
def packed(demo_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten samples in three shards: of the demo, one without images, one of two tiny pictures."""
    reader = ShardReader(open_dataset(demo_folder / "train"))
    samples = [reader.read(number) for number in range(8)]
    samples[4:4] = [replace(make_sample(1, plan=False), input_images=()), make_sample(2)]
    folder = tmp_path_factory.mktemp("feature-pass") / "set"
    write_shards(((sample, 0) for sample in samples), folder, max_samples_per_shard=4)
    return folder


@pytest.fixture(scope="module")
def settings(packed: Path, demo_folder: Path) -> EncodeSettings:
    model = ModelConfig(path=str(demo_folder / "model"))
    return EncodeSettings(str(packed), model, "fp32", PIXELS, workers=0)


@pytest.fixture(scope="module")
def encoded(settings: EncodeSettings, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All in one go, one sample at a time."""
    output = tmp_path_factory.mktemp("encoded") / "features"
    encode(replace(settings, output=output, batch_patches=1), CPU)
    return output


def stored(folder: Path, settings: EncodeSettings) -> list[np.ndarray]:
    """The rows of every sample."""
    dataset = open_dataset(settings.shards)
    images = ImageEncoder(settings.model.path, settings.max_image_pixels, settings.blank_images)
    made_of = {"data": dataset.fingerprint, **tower_identity(settings.model, images)}
    features = open_features(folder, dataset, made_of, "data.features", "")
    return [features.read(n, int(e["inputs"]), int(e["helpers"])) for n, e in enumerate(features.index)]


def bf16(rows: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(rows.view(np.int16)).view(torch.bfloat16)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_rows_are_those_of_the_tower_that_training_would_use(
    precision: str, settings: EncodeSettings, packed: Path, tmp_path: Path
) -> None:
    """Bit by bit, sample by sample. Catches a tower loaded in another precision (its rotary frequencies are float32),
    other pixels, another order of images, rows of the neighbour."""
    chosen = replace(settings, precision=precision, output=tmp_path / "f", batch_patches=1)
    encode(chosen, CPU)
    model = load_student(settings.model, DTYPES[precision], num_tokens=0)
    images = ImageEncoder(settings.model.path, PIXELS)
    tower = tower_of(model, images)
    layout = vision_layout(load_config(settings.model.path))
    reader, rows = ShardReader(open_dataset(packed)), stored(tmp_path / "f", chosen)
    for number in range(10):
        sample = reader.read(number)
        parts = images((*sample.input_images, *sample.helper_images))
        if not parts:
            assert rows[number].shape == (0, 64)
            continue
        patches = torch.from_numpy(np.concatenate([patches for patches, _ in parts]))
        expected = tower(ImageBatch(patches, **attention_bookkeeping([grid for _, grid in parts], layout)))
        assert torch.equal(bf16(rows[number]), expected.bfloat16()), number


def test_several_samples_a_call_differ_by_rounding_alone(
    settings: EncodeSettings, encoded: Path, tmp_path: Path
) -> None:
    encode(replace(settings, output=tmp_path / "f", batch_patches=200), CPU)
    for together, alone in zip(stored(tmp_path / "f", settings), stored(encoded, settings), strict=True):
        a, b = bf16(together).float(), bf16(alone).float()
        assert a.shape == b.shape and bool(((a - b).abs() <= 2**-7 * b.abs() + 1e-4).all())


def test_worker_processes_change_nothing(settings: EncodeSettings, encoded: Path, tmp_path: Path) -> None:
    lines = encode(replace(settings, output=tmp_path / "f", batch_patches=1, workers=2), CPU)
    assert contents(tmp_path / "f") == contents(encoded)
    assert lines[0].startswith(f"{tmp_path / 'f'}: 10 samples encoded in ")
    assert lines[-1].startswith(f"to train on them: data.features: {tmp_path / 'f'}")


KILLED = """
import os, signal, sys, torch
from pathlib import Path
from ilvr_ds.config import ModelConfig
from ilvr_ds.model.feature_pass import EncodeSettings, encode
shards, model, output = sys.argv[1:]
settings = EncodeSettings(shards, ModelConfig(path=model), "fp32", 1003520, output=Path(output), batch_patches=1)
die = lambda done, total, size: os.kill(os.getpid(), signal.SIGKILL) if done == 6 else None
encode(settings, torch.device("cpu"), die)
"""


def test_a_killed_encode_goes_on_to_the_same_bytes(settings: EncodeSettings, encoded: Path, tmp_path: Path) -> None:
    """SIGKILL in the second of three shards. Catches half shards that count as whole, and work that is done twice."""
    output = tmp_path / "f"
    command = [sys.executable, "-c", KILLED, settings.shards, settings.model.path, str(output)]
    run = subprocess.run(command, cwd=ROOT, timeout=120, check=False, capture_output=True)
    assert run.returncode == -9, run.stderr[-2000:]
    assert (output / "shard-000000.json").exists() and list(output.glob("shard-000001.rows.partial-*"))
    assert not (output / "features.json").exists()
    first = (output / "shard-000000.rows").stat().st_mtime_ns
    lines = encode(replace(settings, output=output, batch_patches=1), CPU)
    assert "6 samples encoded" in lines[0] and lines[1] == "1 of 3 shards were whole already"
    assert contents(output) == contents(encoded)
    assert (output / "shard-000000.rows").stat().st_mtime_ns == first


def test_nothing_is_left_to_do(settings: EncodeSettings, encoded: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feature_pass, "load_tower", lambda *_: pytest.fail("the tower is loaded for nothing"))
    lines = encode(replace(settings, output=encoded), CPU)
    assert lines[0].endswith("0 samples encoded in 0 s (nothing to do)")


def test_parts_in_any_order_make_the_whole(settings: EncodeSettings, encoded: Path, tmp_path: Path) -> None:
    """As jobs of an array. Catches a shard in no part or in two, and a description that comes too early."""
    output = tmp_path / "f"
    done = []
    for part in ((1, 2), (0, 2)):
        assert not (output / "features.json").exists()
        done += [encode(replace(settings, output=output, batch_patches=1, part=part), CPU)]
    assert "shards of other parts are missing" in done[0][-1] and "to train on them" in done[1][-1]
    assert contents(output) == contents(encoded)


def test_a_damaged_sample_gets_no_rows(
    settings: EncodeSettings, packed: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """One bad sample does not end the work of hours; training replaces it and says so."""
    folder = Path(shutil.copytree(packed, tmp_path / "set"))
    index = open_dataset(folder).index
    data = bytearray((folder / "shard-000001.tar").read_bytes())
    data[int(index["offset"][6]) + int(index["length"][6]) // 2] ^= 1
    (folder / "shard-000001.tar").write_bytes(data)
    output = tmp_path / "f"
    lines = encode(replace(settings, shards=str(folder), output=output), CPU)
    assert "samples without features, which training will replace: 1" in lines
    rows = stored(output, replace(settings, shards=str(folder)))
    assert [len(r) == 0 for r in rows] == [number in (4, 6) for number in range(10)], "4 has no images"


def test_a_lost_shard_ends_it(settings: EncodeSettings, packed: Path, tmp_path: Path) -> None:
    """A file system that is away must not become a shard of samples without features."""
    folder = Path(shutil.copytree(packed, tmp_path / "set"))

    def lose(done: int, total: int, size: int) -> None:
        (folder / "shard-000002.tar").unlink(missing_ok=True)

    with pytest.raises(UserError, match=r"shard-000002\.tar: cannot be read"):
        encode(replace(settings, shards=str(folder), output=tmp_path / "f"), CPU, lose)
    assert (tmp_path / "f/shard-000001.json").exists() and not (tmp_path / "f/shard-000002.json").exists()


def test_over_http_it_needs_an_output(settings: EncodeSettings, packed: Path, encoded: Path, tmp_path: Path) -> None:
    with serve(packed) as (address, _):
        with pytest.raises(UserError, match="nothing can be written there; give --output FOLDER"):
            encode(replace(settings, shards=address), CPU)
        encode(replace(settings, shards=address, output=tmp_path / "f", batch_patches=1), CPU)
    assert contents(tmp_path / "f") == contents(encoded)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"precision": "bf16"}, "precision = fp32 (here bf16)"),
        ({"max_image_pixels": 6272}, "images.max_pixels = 1003520 (here 6272)"),
        ({"blank_images": True}, "images.blank = False (here True)"),
    ],
)
def test_two_makes_do_not_mix(change: dict[str, Any], words: str, settings: EncodeSettings, encoded: Path) -> None:
    with pytest.raises(UserError) as caught:
        encode(replace(settings, output=encoded, **change), CPU)
    assert words in str(caught.value) and "give another --output, or remove it" in str(caught.value)


def test_features_that_are_not_finite_are_refused(
    settings: EncodeSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Overflow of fp16, or broken weights: catches rows that would make every loss NaN."""

    def broken(*arguments: Any) -> VisionTower:
        tower = load_tower(*arguments)
        next(tower.parameters()).data.fill_(float("inf"))
        return tower

    monkeypatch.setattr(feature_pass, "load_tower", broken)
    with pytest.raises(UserError, match="--precision fp32: the tower's features are not finite"):
        encode(replace(settings, output=tmp_path / "f"), CPU)
    assert not (tmp_path / "f/shard-000000.json").exists()


def test_the_identity_is_that_of_the_content(settings: EncodeSettings, tmp_path: Path) -> None:
    """Copies, other file times and exact copies in another precision are the same tower; one other weight is not."""
    images = ImageEncoder(settings.model.path, PIXELS)
    identity = tower_identity(settings.model, images)
    model = load_student(settings.model, torch.float32, num_tokens=0)
    weights = dict(model.named_parameters())
    for name, change in (("same", 0.0), ("other", 1.0)):
        weights["model.visual.merger.mlp.2.bias"].data[3] += change
        model.save_pretrained(tmp_path / name)
    assert tower_identity(ModelConfig(path=str(tmp_path / "same")), images) == identity
    other = tower_identity(ModelConfig(path=str(tmp_path / "other")), images)
    assert [key for key in identity if other[key] != identity[key]] == ["tower"]
    model.to(torch.bfloat16).save_pretrained(tmp_path / "bf16")
    model.to(torch.float32).save_pretrained(tmp_path / "fp32-of-bf16")
    short, long = (tower_identity(ModelConfig(path=str(tmp_path / n)), images) for n in ("bf16", "fp32-of-bf16"))
    assert short["tower"] == long["tower"] != other["tower"]


@pytest.mark.parametrize("text", ["8/8", "1", "a/b", "-1/2", "0/0", "1/"])
def test_a_part_that_does_not_exist_is_a_mistake(text: str) -> None:
    with pytest.raises(UserError, match=f"--part {text}: expected I/N with I from 0 to N-1"):
        parse_part(text)


def test_the_command(packed: Path, demo_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """By options or by a recipe; the recipe's precision is the tower's."""
    recipe = ["--config", str(ROOT / "launch/recipes/demo.yaml"), "--set", f"data.shards={packed}"]
    recipe += ["--set", f"model.path={demo_folder / 'model'}", "--output", str(tmp_path / "r"), "--workers", "0"]
    assert main(["encode", *recipe]) == 0
    assert "whole: " in capsys.readouterr().out
    assert main(["encode", *recipe, "--precision", "bf16"]) == 2
    assert "precision = fp32 (here bf16)" in capsys.readouterr().err
    options = ["--shards", str(packed), "--model", str(demo_folder / "model"), "--output", str(tmp_path / "o")]
    assert main(["encode", *options, "--precision", "fp32", "--part", "0/1"]) == 0
    assert contents(tmp_path / "o") == contents(tmp_path / "r")
    capsys.readouterr()
    assert main(["encode", "--shards", str(packed)]) == 2
    assert "give --shards and --model, or a recipe by --config" in capsys.readouterr().err
