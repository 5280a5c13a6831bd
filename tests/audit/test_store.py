"""Latents on disk, between the two passes of an audit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from ilvr_ds.audit.store import LatentStore
from tests.full_disk import files_end_at


def test_latents_come_back_by_kind_sample_and_segment(tmp_path: Path) -> None:
    store = LatentStore(tmp_path, [[3, 5]])
    own, target = torch.ones(2, 4), torch.zeros(2, 4)
    store.write({"own": {3: [own, 2 * own], 5: []}, "target": {3: [target], 5: [target.clone()]}})
    [[first, second], none, nobody] = store.read("own", [3, 5, None])
    assert torch.equal(first, own) and torch.equal(second, 2 * own) and none == nobody == []
    [[found]] = store.read("target", [5])
    assert torch.equal(found, target)


def test_a_full_disk_is_told_as_the_system_tells_it(tmp_path: Path) -> None:
    """Catches the error of safetensors, which the command line does not know for a full disk."""
    store = LatentStore(tmp_path, [[0]])
    with pytest.raises(OSError, match="File too large"), files_end_at(100):
        store.write({"own": {0: [torch.ones(100, 4)]}})
    assert not list(store.folder.iterdir())
