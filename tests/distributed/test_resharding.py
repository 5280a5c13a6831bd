"""A run goes on with other numbers of ranks, ZeRO stages and layouts under them: same samples, same curve."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from ilvr_ds.checkpoint import files
from tests.distributed.test_runs import assert_same_losses, losses, overrides
from tests.ranks import ROOT, run_ranks
from tests.recipes import RECIPE

WORKER = "tests.distributed.workers_run:train"
ZERO1, ZERO2 = (str(ROOT / f"ds_configs/zero{stage}.json") for stage in (1, 2))
GROUPS = "several sub-groups"
"""ZeRO-3 in pieces of 20,000 elements, as large models have them; DeepSpeed gives all one step counter."""


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory, demo_folder: Path) -> dict[str, Any]:
    """8 samples a step for 6 steps in one piece, and the same run stopped after 3; 2 ranks, ZeRO-3."""
    folder = tmp_path_factory.mktemp("stopped")
    settings = overrides(folder / "whole", demo_folder, train__grad_accum_steps=1)
    whole = run_ranks(WORKER, 2, folder / "ranks-whole", recipe=RECIPE, overrides=settings)
    settings = overrides(folder / "part", demo_folder, train__grad_accum_steps=1)
    run_ranks(WORKER, 2, folder / "ranks-part", recipe=RECIPE, overrides=settings, stop_after=3)
    return {"whole": whole, "losses": losses(folder / "whole"), "folder": folder / "part"}


@pytest.mark.parametrize(
    ("ranks", "micro", "zero"),
    [
        (1, 4, GROUPS),
        (2, 4, ZERO2),
        *(pytest.param(*case, marks=pytest.mark.drill) for case in ((4, 2, ""), (1, 8, ZERO2), (2, 4, ZERO1))),
    ],
)
def test_a_run_goes_on_with_other_slices(
    tmp_path: Path, demo_folder: Path, stopped: dict[str, Any], ranks: int, micro: int, zero: str
) -> None:
    """The judge is the run in one piece; the rest is the order of fp32 sums. Catches moments or averages that are cut
    wrongly or left at zero, steps that are counted twice, and ranks that read other samples."""
    if zero == GROUPS:
        zero = str(tmp_path / "groups.json")
        Path(zero).write_text('{"zero_optimization": {"stage": 3, "sub_group_size": 20000}}')
    shutil.copytree(stopped["folder"], tmp_path / "run")
    settings = overrides(
        tmp_path / "run",
        demo_folder,
        train__micro_batch_size=micro,
        train__grad_accum_steps=8 // micro // ranks,
        checkpoint__resume="must",
    )
    settings += [f"deepspeed.config={zero}"] if zero else []
    results = run_ranks(WORKER, ranks, tmp_path / "ranks", recipe=RECIPE, overrides=settings)
    expected = stopped["whole"][0]
    for kind in ("weights", "moments"):
        for name, tensor in expected[kind].items():
            torch.testing.assert_close(results[0][kind][name], tensor, rtol=2e-3, atol=2e-6, msg=f"{kind} {name}")
    assert_same_losses(losses(tmp_path / "run"), stopped["losses"])
    for slices, pieces in zip(averages(results), averages(stopped["whole"]), strict=True):
        size = min(len(slices), len(pieces))  # what follows is padding
        torch.testing.assert_close(slices[:size], pieces[:size], rtol=2e-3, atol=2e-6)


def averages(ranks: list[dict[str, Any]]) -> list[torch.Tensor]:
    """The teacher's weights, put together from the slices of all ranks."""
    return [torch.cat(slices) for slices in zip(*(rank["teacher"] for rank in ranks), strict=True)]


@pytest.mark.parametrize(
    ("zero", "ranks"), [(ZERO2, 1), pytest.param(ZERO1, 2, marks=pytest.mark.drill)], ids=["zero2", "zero1"]
)
def test_a_run_goes_on_under_zero3(
    tmp_path: Path, demo_folder: Path, stopped: dict[str, Any], zero: str, ranks: int
) -> None:
    """The other direction: saved under ZeRO-1 or 2, 2 ranks under ZeRO-3 go on."""
    changes = {"train__micro_batch_size": 2, "train__grad_accum_steps": 4 // ranks}
    settings = [*overrides(tmp_path / "run", demo_folder, **changes), f"deepspeed.config={zero}"]
    run_ranks(WORKER, ranks, tmp_path / "1", recipe=RECIPE, overrides=settings, stop_after=3)
    settings = overrides(tmp_path / "run", demo_folder, train__grad_accum_steps=1, checkpoint__resume="must")
    run_ranks(WORKER, 2, tmp_path / "2", recipe=RECIPE, overrides=settings)
    assert_same_losses(losses(tmp_path / "run"), stopped["losses"])


@pytest.mark.drill
@pytest.mark.parametrize(
    ("saved", "now"),
    [
        ({"stage": 3}, {"stage": 3, "sub_group_size": 20000}),
        ({"stage": 2}, {"stage": 2, "parameter_alignment": True}),
        ({"stage": 2, "parameter_alignment": True}, {"stage": 2}),
    ],
    ids=lambda zero: "-".join(map(str, zero.values())),
)
def test_a_run_goes_on_with_another_layout(
    tmp_path: Path, demo_folder: Path, stopped: dict[str, Any], saved: dict[str, Any], now: dict[str, Any]
) -> None:
    """Catches optimizer states that are copied by position into other pieces, and DeepSpeed's own traceback."""
    for number, zero in enumerate((saved, now)):
        file = tmp_path / f"{number}.json"
        file.write_text(json.dumps({"zero_optimization": zero}))
        settings = overrides(tmp_path / "run", demo_folder, train__grad_accum_steps=1, checkpoint__resume="auto")
        settings.append(f"deepspeed.config={file}")
        results = run_ranks(
            WORKER, 2, tmp_path / f"ranks-{number}", recipe=RECIPE, overrides=settings, stop_after=0 if number else 3
        )
    assert (
        files.saved_state(tmp_path / "run/demo/checkpoints/step-00000006")["layout"].items()
        >= {key: value for key, value in now.items() if key != "stage"}.items()
    )
    for name, tensor in stopped["whole"][0]["weights"].items():
        torch.testing.assert_close(results[0]["weights"][name], tensor, rtol=2e-3, atol=2e-6, msg=f"weight {name}")
    assert_same_losses(losses(tmp_path / "run"), stopped["losses"])


@pytest.mark.drill
@pytest.mark.parametrize(
    "changes",
    [
        ["model.lora_rank=4"],
        ["model.lora_rank=4", "model.lora_base=nf4"],
        ["model.lora_rank=4", f"deepspeed.config={ZERO1}"],
        ["train.stage=2", f"deepspeed.config={ZERO2}"],
        ["train.stage=2", f"deepspeed.config={ZERO2}", "loss.align_weight=0", "loss.contrastive_weight=0"],
    ],
)
def test_so_do_adapters_and_stage_2(tmp_path: Path, demo_folder: Path, changes: list[str]) -> None:
    """2 ranks save, 1 goes on: frozen weights beside trained ones, own latents, and no teacher at all."""
    settings = overrides(tmp_path / "whole", demo_folder, train__grad_accum_steps=1)
    run_ranks(WORKER, 2, tmp_path / "1", recipe=RECIPE, overrides=[*settings, *changes])
    settings = overrides(tmp_path / "part", demo_folder, train__grad_accum_steps=1)
    run_ranks(WORKER, 2, tmp_path / "2", recipe=RECIPE, overrides=[*settings, *changes], stop_after=3)
    settings = overrides(tmp_path / "part", demo_folder, checkpoint__resume="must")
    run_ranks(WORKER, 1, tmp_path / "3", recipe=RECIPE, overrides=[*settings, *changes])
    assert_same_losses(losses(tmp_path / "part"), losses(tmp_path / "whole"))
