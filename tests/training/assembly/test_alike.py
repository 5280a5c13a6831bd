"""Hosts without a common disk have copies of their own: what differs is said before anything is trained."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from ilvr_ds import dist
from ilvr_ds.config import load_recipe
from ilvr_ds.engine.networks import init_process_group
from ilvr_ds.errors import UserError
from ilvr_ds.training.assembly.alike import check_alike
from ilvr_ds.training.assembly.inputs import Inputs
from tests.distributed.test_runs import overrides
from tests.ranks import run_ranks
from tests.recipes import RECIPE

WORKER = "tests.training.assembly.test_alike:refusal"


def refusal(settings: list[str], of_rank_1: list[str]) -> str:
    """On a rank: what is said of a job whose second rank has other settings."""
    recipe = load_recipe(RECIPE, settings + (of_rank_1 if dist.enter().rank else []))
    inputs = Inputs.read(recipe, Path(RECIPE), 2)
    init_process_group()
    try:
        check_alike(recipe, inputs)
    except UserError as error:
        return str(error)
    return ""


@pytest.mark.parametrize(
    ("of_rank_1", "says"),
    [
        (["data.shards={copy}/train", "model.path={copy}/model", "data.num_workers=1"], ""),
        (["data.shards={copy}/held_out"], "data.shards: {ranks} have different data sets there; give every host"),
        (["data.eval_shards={copy}/train"], "data.eval_shards: {ranks} have different data sets there; give every"),
        (["optim.lr=0.5"], "optim.lr: {ranks} have different settings (0.0003 and 0.5); give all ranks the same"),
        (["deepspeed.config=zero2"], "deepspeed.config: {ranks} have different settings; give all ranks the same"),
    ],
)
def test_ranks_that_would_not_train_the_same_are_named(
    tmp_path: Path, demo_folder: Path, of_rank_1: list[str], says: str
) -> None:
    """Catches a run on a mix of two versions of a data set; and copies that are refused for their place."""
    copy = shutil.copytree(demo_folder, tmp_path / "copy")
    settings = overrides(tmp_path / "out", demo_folder, optim__lr=3e-4, data__lanes=8, train__grad_accum_steps=1)
    of_rank_1 = [text.format(copy=copy) for text in of_rank_1]
    for said in run_ranks(WORKER, 2, tmp_path / "ranks", settings=settings, of_rank_1=of_rank_1):
        if not says:
            assert said == ""
            continue
        key, _, rest = says.partition("{ranks}")
        assert said.startswith(f"{key}rank 0 on ") and " and rank 1 on " in said and rest in said
