"""What the ranks do in the test of weights that are gathered after a step."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator as Coordinator
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3 as Stage3Optimizer
from torch import Tensor

from ilvr_ds import dist
from ilvr_ds.config import SelectionConfig, TrainConfig
from ilvr_ds.engine import networks
from tests.golden_set import golden_set
from tests.runs import SmallRun, golden_recipe

GATHER, STREAM = (f"_PartitionedParameterCoordinator__{name}" for name in ("all_gather_params_", "allgather_stream"))
WRITE = "_reassign_or_swap_out_partitioned_parameters"
"""Into the shards that are gathered"""


def gathered_weights(is_mended: bool) -> Counter[bool]:
    """Two steps as on a GPU, where weights are gathered in a stream of its own: of the gathers after the first
    optimizer's step, how many have waited for it, and how many have not."""
    without_teacher = SelectionConfig(pool="changed", by="change", unchanged="none", temperature=0.1)
    recipe = golden_recipe(golden_set(), selection=without_teacher, train=TrainConfig(precision="bf16"))
    zero = {
        "stage": 3, "overlap_comm": True, "contiguous_gradients": True, "stage3_param_persistence_threshold": 0,
        "stage3_prefetch_bucket_size": 0,
    }  # fmt: skip
    found: Counter[bool] = Counter()
    ahead: set[Any] = set()
    """Streams in which something new may run before the last step has written"""

    class Stream:
        def __init__(self) -> None:
            streams.append(self)

        def wait_stream(self, other: Stream) -> None:
            if other not in ahead:
                ahead.discard(self)

        def synchronize(self) -> None:
            if self not in ahead:
                ahead.clear()

    @contextmanager
    def within(_: Any, stream: Stream) -> Iterator[None]:
        current.append(stream)
        yield
        current.pop()

    streams: list[Stream] = []
    current = [main := Stream()]
    write, gather = getattr(Stage3Optimizer, WRITE), getattr(Coordinator, GATHER)

    def watched_write(optimizer: Any, group: int) -> None:
        write(optimizer, group)
        ahead.update(stream for stream in streams if stream is not main)

    def watched_gather(coordinator: Any, *arguments: Any, **named: Any) -> None:
        if stepped:
            found[getattr(coordinator, STREAM) not in ahead] += 1
        gather(coordinator, *arguments, **named)

    with pytest.MonkeyPatch.context() as patch:
        accelerator = type(get_accelerator())
        for name in ("is_synchronized_device", "resolves_data_dependency"):
            patch.setattr(accelerator, name, lambda _: False)
        patch.setattr(accelerator, "handles_memory_backpressure", lambda _: True)  # no events
        patch.setattr(accelerator, "Stream", Stream)
        patch.setattr(accelerator, "stream", within)
        patch.setattr(accelerator, "current_stream", lambda *_: current[-1])
        patch.setattr(accelerator, "synchronize", lambda *_: ahead.clear())
        patch.setattr(Tensor, "record_stream", lambda *_: None)
        patch.setattr(Stage3Optimizer, WRITE, watched_write)
        patch.setattr(Coordinator, GATHER, watched_gather)
        if not is_mended:
            patch.setattr(networks, "gather_when_written", lambda _: None)
        run = SmallRun.start(recipe, {"zero_optimization": zero})
        for stepped in range(2):
            run.train(run.window([dist.rank()]), stepped)
    return found
