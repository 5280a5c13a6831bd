from __future__ import annotations

import shutil
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def model(demo_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo's random model with latent tokens; what it likes to say first opens a segment."""
    from ilvr_ds.data.reader import ShardReader
    from ilvr_ds.data.shards import open_dataset
    from tests.evaluation.latent_model import let_open_a_segment

    folder = tmp_path_factory.mktemp("model") / "model"
    shutil.copytree(demo_folder / "model", folder)
    return let_open_a_segment(folder, ShardReader(open_dataset(demo_folder / "held_out")).read(0))
