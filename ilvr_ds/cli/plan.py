"""`plan`."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

from ilvr_ds import shipped
from ilvr_ds.cli.options import Commands, add_command, add_recipe, recipe_if_given
from ilvr_ds.config import Recipe
from ilvr_ds.errors import UserError


def add_plan(commands: Commands) -> None:
    """The options of `plan`."""
    command = add_command(
        commands, "plan", "what fits on a card, the fastest first; memory and least time of a recipe", "performance.md"
    )
    command.add_argument(
        "--model", metavar="NAME|PATH",
        help="whose sizes are taken: a released model (3b, 7b, qwen3vl_8b, ...), a folder, a config.json, or a name on "
        "the hub (default: the recipe's)",
    )  # fmt: skip
    command.add_argument("--gpus", type=int, default=1, help="number of ranks, one per GPU (default 1)")
    command.add_argument("--card", metavar="NAME", help="its memory and rates: RTX 4090, A6000, A100 80, H100, ...")
    command.add_argument(
        "--gpu-memory", type=float, metavar="SIZE",
        help="of each GPU: the size in the card's name (80: it has 79.2 GiB), or GiB as `doctor` prints them",
    )  # fmt: skip
    command.add_argument("--host-memory", type=float, metavar="GIB", help="of each rank, which what fits may take")
    command.add_argument(
        "--chip", help="its peaks bound the time (default: the card's, or by --gpu-memory H100, above 100 GiB H200)"
    )
    command.add_argument("--write", type=Path, metavar="FILE", help="write what fits best as a recipe")
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
        card=options.card,
        host_memory=options.host_memory,
        write=options.write,
    )
    lines = plan(settings, shipped.recipes(), load_config, read_deepspeed_json)
    recipe = recipe_if_given(options) if options.config else None
    if recipe is not None and recipe.data.is_mixture:
        lines = [*lines, "", *_mixture_lines(recipe, options.gpus)]
    print("\n".join(lines))
    return 0


def _mixture_lines(recipe: Recipe, gpus: int) -> Iterator[str]:
    """What a whole run takes of each data set, where they can be read here."""
    from ilvr_ds.data.mixture import Mixture
    from ilvr_ds.data.mixture_plan import build_plan
    from ilvr_ds.training.shares import share_lines

    try:
        mixture = Mixture.open(recipe.data.sets)
        samples = build_plan(recipe, mixture, gpus)
    except UserError as error:
        yield f"the mixture was not looked at: {error}"
        return
    steps = recipe.train.max_steps or recipe.train.epochs * samples.steps_per_epoch
    yield f"the mixture, {samples.steps_per_epoch} steps an epoch:"
    yield from (f"  {line}" for line in share_lines(samples, mixture.named, steps))
