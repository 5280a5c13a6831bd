"""`plan`."""

from __future__ import annotations

import argparse

from ilvr_ds import shipped
from ilvr_ds.cli.options import Commands, add_recipe


def add_plan(commands: Commands) -> None:
    """The options of `plan`."""
    command = commands.add_parser("plan", help="memory and least time of a recipe, and which recipes fit")
    command.add_argument(
        "--model", metavar="3b|7b|qwen3-4b|qwen3-8b|FOLDER", help="whose sizes are taken (default: the recipe's)"
    )
    command.add_argument("--gpus", type=int, required=True, help="number of ranks, one per GPU")
    command.add_argument(
        "--gpu-memory", type=float, required=True, metavar="SIZE",
        help="of each GPU: the size in the card's name (80: it has 79.2 GiB), or GiB as `doctor` prints them",
    )  # fmt: skip
    command.add_argument("--chip", help="its peaks bound the time (default: H100 up to 100 GiB, else H200)")
    add_recipe(command, "one recipe in detail (default: a line for each of ours)")
    command.add_argument("--tokens", type=int, default=1030, help="of a typical sample (default 1030)")
    command.add_argument("--labels", type=int, default=280, help="of these supervised (default 280)")
    command.add_argument("--patches", type=int, default=5376, help="of its images, before merging (default 5376)")
    command.set_defaults(run=_plan)


def _plan(options: argparse.Namespace) -> int:
    from ilvr_ds.engine.settings import read_deepspeed_json
    from ilvr_ds.model.student import load_config
    from ilvr_ds.planning.command import PlanOptions, plan
    from ilvr_ds.planning.setup import SampleSize

    settings = PlanOptions(
        model=options.model,
        gpus=options.gpus,
        gpu_memory=options.gpu_memory,
        chip=options.chip,
        config=options.config,
        overrides=tuple(options.set),
        sample=SampleSize(options.tokens, options.labels, options.patches),
    )
    print("\n".join(plan(settings, shipped.recipes(), load_config, read_deepspeed_json)))
    return 0
