"""Every optimizer that a recipe can name trains under ZeRO-3."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.ranks import run_ranks

WORKER = "tests.distributed.workers:trained_by"


@pytest.mark.drill
@pytest.mark.timeout(900)
def test_cpu_adam_with_offload_equals_adamw(tmp_path: Path) -> None:
    """Catches a DeepSpeedCPUAdam in Adam's mode (coupled decay) or with other betas; its first use compiles it."""
    reference, tested = (
        run_ranks(WORKER, 1, tmp_path / name, optimizers=[name], offload=name == "cpu_adam", steps=3)[0][0]
        for name in ("adamw", "cpu_adam")
    )
    assert reference["moved"] > 1e-3
    for name, weight in reference["weights"].items():
        assert float((tested["weights"][name] - weight).norm() / weight.norm()) < 1e-5, name


def test_eight_bit_optimizers_train(tmp_path: Path) -> None:
    """Quantised moments: no equality, but the loss falls, and weights move by about the rate a step."""
    names = ["adamw", "adamw_8bit", "paged_adamw_8bit"]
    reference, *tested = run_ranks(WORKER, 1, tmp_path, optimizers=names, offload=False, steps=8)[0]
    for result in tested:
        assert 0.5 < result["moved"] / reference["moved"] < 2
        fall = result["losses"][0] - result["losses"][-1]
        assert fall > 0.5 * (reference["losses"][0] - reference["losses"][-1]) > 0
