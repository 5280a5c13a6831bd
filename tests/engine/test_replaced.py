"""What of DeepSpeed and torch is replaced while engines start, and private state that is read: both must still use it.

A failure means that the library has moved. Read its new code before the replacement is mended, or dropped.
"""

from __future__ import annotations

from collections.abc import Iterator
from types import CodeType, SimpleNamespace
from typing import Any

import deepspeed
import pytest
import torch
from deepspeed.comm.torch import build_shm_op
from deepspeed.ops.op_builder.cpu import ShareMemCommBuilder
from deepspeed.runtime.constants import BFLOAT16
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.runtime.zero import stage3
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3 as Stage3Optimizer
from torch.distributed import distributed_c10d

from ilvr_ds.engine import networks


def names_in(code: CodeType) -> Iterator[str]:
    """Names that a function and those within it look up."""
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from names_in(constant)


NETWORKS = "ilvr_ds/engine/networks.py"


@pytest.mark.parametrize(
    ("function", "name", "place"),
    [
        (Stage3Optimizer.create_reduce_and_remove_grad_hooks, "z3_leaf_parameter", f"_gradients_by_weight, {NETWORKS}"),
        (
            DeepSpeedEngine._configure_optimizer,
            "_do_optimizer_sanity_check",
            f"_one_optimizer_for_all_sums, {NETWORKS}",
        ),
        (build_shm_op, "__compatible_ops__", f"init_process_group, {NETWORKS}"),
        (distributed_c10d._get_default_timeout, "default_pg_timeout", "set_patience, ilvr_ds/dist.py"),
        (distributed_c10d._get_default_timeout, "default_pg_nccl_timeout", "set_patience, ilvr_ds/dist.py"),
    ],
)
def test_the_library_still_asks_what_is_replaced(function: Any, name: str, place: str) -> None:
    """Catches a replacement that nobody calls: gradients would be wrong, or a minute of compiling back, in silence."""
    versions = f"DeepSpeed {deepspeed.__version__}, torch {torch.__version__}"
    assert name in set(names_in(function.__code__)), (
        f"{versions}: {function.__qualname__} no longer asks {name}: {place}"
    )


def test_both_replacements_last_only_while_the_engine_starts() -> None:
    before = stage3.z3_leaf_parameter, DeepSpeedEngine._do_optimizer_sanity_check
    with networks._gradients_by_weight(), networks._one_optimizer_for_all_sums():
        assert stage3.z3_leaf_parameter(torch.ones(1)) is False
        assert DeepSpeedEngine._do_optimizer_sanity_check(None, None) == networks.ZERO_OPTIMIZATION
    assert before == (stage3.z3_leaf_parameter, DeepSpeedEngine._do_optimizer_sanity_check)


def test_without_the_replacement_zero_1_would_take_another_optimizer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Says when `_one_optimizer_for_all_sums` is needed no more."""
    monkeypatch.setattr("deepspeed.runtime.engine.is_zero_supported_optimizer", lambda optimizer: True)
    engine: Any = SimpleNamespace(
        get_data_types=lambda: (torch.bfloat16, torch.float32),
        zero_optimization=lambda: True,
        zero_optimization_stage=lambda: 1,
        zero_cpu_offload=lambda: False,
        zero_compute_grad_norm=lambda: True,
    )
    found = DeepSpeedEngine._do_optimizer_sanity_check(engine, torch.optim.AdamW([torch.ones(1)]))
    assert found == BFLOAT16, "DeepSpeed now sums in float32 with ZeRO-1's own optimizer: drop the replacement"


def test_the_operator_that_is_switched_off_is_one_of_deepspeeds() -> None:
    """Catches a name that moved: it would be compiled again, a minute on each host."""
    assert ShareMemCommBuilder.NAME in deepspeed.ops.__compatible_ops__, (
        f"DeepSpeed {deepspeed.__version__} no longer lists {ShareMemCommBuilder.NAME}; see init_process_group"
    )


def test_private_state_that_shards_are_read_from_is_there() -> None:
    """The teacher follows the optimizer's own memory; the public safe_get_local_fp32_param copies what is offloaded."""
    assert hasattr(Stage3Optimizer, "_get_fp32_opt_state_partition"), (
        f"DeepSpeed {deepspeed.__version__}: ZeRO-3 has its master shards elsewhere; see Networks._master_shards"
    )
