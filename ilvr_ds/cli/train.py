"""`train`."""

from __future__ import annotations

import argparse

from ilvr_ds.cli.options import Commands, add_recipe, recipe_of


def add_train(commands: Commands) -> None:
    """The options of `train`."""
    command = commands.add_parser("train", help="train; alone it is one rank, launchers start several")
    add_recipe(command, "recipe: a YAML file, or the name of one of ours", required=True)
    command.add_argument("--resume", metavar="auto|must|never|PATH", help="the same as --set checkpoint.resume=...")
    command.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # the deepspeed launcher adds it
    command.set_defaults(run=_train, by_ranks=True)


def _train(options: argparse.Namespace) -> int:
    if options.resume:
        options.set.append(f"checkpoint.resume={options.resume}")
    recipe = recipe_of(options)
    from ilvr_ds.training.run import train

    return train(recipe, options.config)
