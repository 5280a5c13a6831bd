"""`train`."""

from __future__ import annotations

import argparse
import os

from ilvr_ds import launcher
from ilvr_ds.cli.options import Commands, add_command, add_recipe, recipe_of
from ilvr_ds.config import Recipe
from ilvr_ds.errors import UserError


def add_train(commands: Commands) -> None:
    """The options of `train`."""
    command = add_command(commands, "train", "train; alone it is one rank, launchers start several", "recipes.md")
    add_recipe(command, "recipe: a YAML file, or the name of one of ours, which `plan` lists", required=True)
    command.add_argument("--resume", metavar="auto|must|never|PATH", help="the same as --set checkpoint.resume=...")
    command.add_argument(
        "--dry-run", type=int, nargs="?", const=0, metavar="RANKS",
        help="print the recipe with its defaults, the data, memory and time of a run on so many ranks, and end "
        "(default: the launcher's ranks)",
    )  # fmt: skip
    command.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # the deepspeed launcher adds it
    command.set_defaults(run=_train, by_ranks=True)


def _train(options: argparse.Namespace) -> int:
    if options.resume:
        options.set.append(f"checkpoint.resume={options.resume}")
    recipe = recipe_of(options)
    if options.dry_run is not None:
        return _dry_run(options, recipe)
    from ilvr_ds.training.run import train

    return train(recipe, options.config)


def _dry_run(options: argparse.Namespace, recipe: Recipe) -> int:
    if options.dry_run < 0:
        raise UserError(f"--dry-run {options.dry_run}: must be a number of ranks")
    place = launcher.find_place(os.environ)
    if place.rank == 0:
        from ilvr_ds.training.dry_run import dry_run

        print("\n".join(dry_run(recipe, options.config, options.dry_run or place.world_size)))
    return 0
