"""`ilvr-ds train` with one fault on one rank, or on "all":

python -m tests.distributed.faulty FAULT RANK STEP train --config ...
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import time
from typing import Any

import torch

from ilvr_ds import cli
from ilvr_ds.training.stage1 import StageOneStep

TELLING_S = 1.0
"""Steps of the demo are shorter than the pause between two messages of a rank; real ones are not."""


def killed(_: Any) -> None:
    time.sleep(TELLING_S)
    os.kill(os.getpid(), signal.SIGKILL)


def killed_late(_: Any) -> None:
    """At the second call."""
    global _calls
    _calls += 1
    if _calls == 2:
        killed(_)


_calls = 0


def stopped(_: Any) -> None:
    time.sleep(TELLING_S)
    os.kill(os.getpid(), signal.SIGSTOP)


def killed_alone(_: Any) -> None:
    """Rank 1 is killed while the others compute, far from any collective."""
    killed(_) if os.environ["RANK"] == "1" else hanging(_)


def hanging(_: Any) -> None:
    time.sleep(3600)


def out_of_memory(_: Any) -> None:
    torch.empty(2**60, dtype=torch.uint8)


def no_worker(_: Any) -> None:
    """A loader worker is killed, as the out-of-memory killer does."""
    for worker in multiprocessing.active_children():
        os.kill(worker.pid or 0, signal.SIGKILL)


def not_a_number(loss: Any) -> Any:
    return loss * float("nan")


FAULTS = {
    f.__name__: f for f in (killed, killed_late, killed_alone, stopped, hanging, out_of_memory, no_worker, not_a_number)
}


def main() -> None:
    fault, rank, at = FAULTS[sys.argv[1]], sys.argv[2], int(sys.argv[3])
    true_loss = StageOneStep.loss

    def loss(self: StageOneStep, micro: Any, prepared: Any, step: int, totals: Any) -> Any:
        value = true_loss(self, micro, prepared, step, totals)
        if rank not in (os.environ["RANK"], "all") or step + 1 < at:
            return value
        changed = fault(value)
        return value if changed is None else changed

    StageOneStep.loss = loss  # type: ignore[method-assign]
    cli.run(sys.argv[4:])


if __name__ == "__main__":
    main()
