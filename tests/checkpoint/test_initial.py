"""Starting from another run: which checkpoint is meant, and what does not fit."""

from __future__ import annotations

import json
import re
import zlib
from pathlib import Path
from typing import Any

import pytest

from ilvr_ds.checkpoint.files import checksum_of
from ilvr_ds.checkpoint.initial import find_initial
from ilvr_ds.config import ModelConfig, Recipe
from ilvr_ds.errors import UserError


def checkpoint(folder: Path, step: int, **model: Any) -> Path:
    path = folder / "checkpoints" / f"step-{step:08d}"
    path.mkdir(parents=True)
    settings = {**Recipe().to_dict()["model"], **model}
    (path / "weights").write_bytes(b"x" * 100)
    state = json.loads(json.dumps({"recipe": {"model": settings}, "files": {"weights": (100, zlib.crc32(b"x" * 100))}}))
    (path / "state.json").write_text(json.dumps(state | {"checksum": checksum_of(state)}))
    return path


def recipe(start: Path | None, **model: Any) -> Recipe:
    return Recipe(model=ModelConfig(init_from=None if start is None else str(start), **model))


def test_a_run_means_its_newest_checkpoint(tmp_path: Path) -> None:
    older, newer = checkpoint(tmp_path, 9), checkpoint(tmp_path, 10)
    assert find_initial(recipe(tmp_path)) == newer
    assert find_initial(recipe(older)) == older
    assert find_initial(recipe(None)) is None


def test_a_folder_without_a_checkpoint_is_a_mistake(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"model.init_from: '.*' is neither a checkpoint nor the folder of a run"):
        find_initial(recipe(tmp_path))


def test_a_state_that_is_torn_is_a_mistake(tmp_path: Path) -> None:
    path = checkpoint(tmp_path, 1)
    (path / "state.json").write_text('{"recipe": {"mo')
    with pytest.raises(UserError, match=r"model\.init_from: .*state\.json: damaged \(JSONDecodeError\)"):
        find_initial(recipe(tmp_path))


def test_a_flipped_bit_is_a_mistake_and_a_run_means_the_checkpoint_before(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Catches weights that are silently wrong, and a torn file that ends in a traceback."""
    older, newer = checkpoint(tmp_path, 9), checkpoint(tmp_path, 10)
    (newer / "weights").write_bytes(b"x" * 99 + b"y")
    assert find_initial(recipe(tmp_path)) == older
    damaged = f"{newer / 'weights'}: damaged (its checksum is another)"
    assert caplog.messages == [f"{damaged}; looking at the checkpoint before it"]
    with pytest.raises(UserError, match=re.escape(f"model.init_from: {damaged}; take another checkpoint")):
        find_initial(recipe(newer))
    (older / "weights").write_bytes(b"x")
    with pytest.raises(UserError, match=r"step-00000009/weights: damaged \(1 bytes .*\); no other is intact"):
        find_initial(recipe(tmp_path))


@pytest.mark.parametrize("change", [{"latent_size": 4}, {"lora_rank": 2}, {"lora_base": "nf4"}])
def test_other_settings_are_a_mistake(tmp_path: Path, change: dict[str, Any]) -> None:
    """Catches a student that is fed another number of latents than it learnt."""
    checkpoint(tmp_path, 1, **change)
    (key,) = change
    with pytest.raises(UserError, match=rf"was made with model.{key} = {change[key]}, here it is"):
        find_initial(recipe(tmp_path))


def test_adapters_count_as_they_did_when_they_were_trained(tmp_path: Path) -> None:
    """Catches another scale of their product, which no weight shows; without adapters it means nothing."""
    checkpoint(tmp_path / "adapters", 1, lora_rank=4, lora_alpha=64.0)
    with pytest.raises(UserError, match=r"was made with model\.lora_alpha = 64\.0, here it is 32\.0"):
        find_initial(recipe(tmp_path / "adapters", lora_rank=4, lora_alpha=32.0))
    path = checkpoint(tmp_path / "all", 1, lora_alpha=64.0)
    assert find_initial(recipe(tmp_path / "all", lora_alpha=32.0)) == path


def test_a_base_in_4_bits_must_be_the_same(tmp_path: Path) -> None:
    """No checkpoint holds it: adapters of one model would run on another without a word."""
    adapted: dict[str, Any] = {"lora_rank": 4, "lora_base": "nf4"}
    path = checkpoint(tmp_path, 1, path="a", **adapted)
    assert find_initial(recipe(tmp_path, path="a", **adapted)) == path
    with pytest.raises(UserError, match=r"made with model.path = a, this run has b; .* give the same path"):
        find_initial(recipe(tmp_path, path="b", **adapted))
    with pytest.raises(UserError, match=r"random_init drew a base for model\.lora_base nf4, stored nowhere"):
        find_initial(recipe(tmp_path, path="a", random_init=True, **adapted))
