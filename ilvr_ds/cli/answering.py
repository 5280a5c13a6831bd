"""What `evaluate` and `audit` share: commands that answer a whole data set on all ranks."""

from __future__ import annotations

import argparse
import logging
import os
from collections.abc import Callable

from ilvr_ds.config import LIMITS
from ilvr_ds.errors import UserError

logger = logging.getLogger("ilvr_ds")


def add_answering(command: argparse.ArgumentParser) -> None:
    """The options of both; `run_answering` heeds them."""
    command.add_argument(
        "--stop-exit-code", type=int, default=0, metavar="N",
        help="after a signal asked to stop; what was answered is kept (default 0, as run.stop_exit_code)",
    )  # fmt: skip
    command.set_defaults(by_ranks=True)


def run_answering(options: argparse.Namespace, work: Callable[[], list[str]]) -> int:
    """Print the lines of `work` on the main rank; returns the exit code, another one where a signal stopped it."""
    from ilvr_ds import dist
    from ilvr_ds.evaluation.batches import Stopped

    least, most = LIMITS["run.stop_exit_code"]
    if not least <= options.stop_exit_code <= most:
        raise UserError(f"--stop-exit-code {options.stop_exit_code}: must be from {least} to {most}")
    try:
        lines = work()
    except Stopped as stopped:
        logger.info("%s", stopped)
        dist.barrier()  # a scheduler that sees the exit code of one rank may kill the others: leave together
        dist.close()
        return int(options.stop_exit_code)
    if os.environ.get("RANK", "0") == "0":
        print("\n".join(lines))
    return 0
