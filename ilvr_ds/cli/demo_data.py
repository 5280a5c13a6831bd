"""`demo-data`."""

from __future__ import annotations

import argparse
from pathlib import Path

from ilvr_ds.cli.options import Commands, add_command
from ilvr_ds.errors import UserError

DRAWN = ("grid", "operations", "signs", "size", "family")
"""Options of which the trained model leaves no choice."""


def add_demo_data(commands: Commands) -> None:
    """The options of `demo-data`."""
    command = add_command(
        commands, "demo-data", "draw the demo task and build a tiny random model for it", "tour.ipynb"
    )
    command.add_argument("--output", type=Path, required=True, help="folder to write")
    command.add_argument("--train", type=int, default=1024, help="training samples (default 1024)")
    command.add_argument("--held-out", type=int, default=128, help="held-out samples (default 128)")
    command.add_argument("--grid", type=int, default=4, help="cells per side of a picture: 4, 6 or 8 (default 4)")
    command.add_argument(
        "--operations", nargs="+", metavar="NAME", default=["creation", "deletion", "update", "selection"],
        help="what to draw, in turn: creation, deletion, update, selection (the default), trail, "
        "look (questions about cells, and captions, without helper images)",
    )  # fmt: skip
    command.add_argument("--signs", type=int, help="signs of a trail (default 6)")
    command.add_argument(
        "--size", choices=["tiny", "mini", "medium", "small"], default="tiny", help="size of the model (default tiny)"
    )
    command.add_argument(
        "--family", metavar="NAME", default="qwen2_5_vl", help="of the model, its model_type (default qwen2_5_vl)"
    )
    command.add_argument(
        "--trained", action="store_true",
        help="the trained model that comes with the package, and trails of 3 signs, which it follows (not with --grid, "
        "--operations, --signs, --size or --family)",
    )  # fmt: skip
    command.add_argument("--seed", type=int, default=0)
    command.add_argument("--workers", type=int, default=1, help="processes that draw (default 1)")
    command.set_defaults(run=_demo_data, defaults={name: command.get_default(name) for name in DRAWN})


def _demo_data(options: argparse.Namespace) -> int:
    from ilvr_ds.demo.material import write_demo, write_trained_demo

    common = (options.seed, options.workers)
    if options.trained:
        for name in DRAWN:
            if getattr(options, name) != options.defaults[name]:
                raise UserError(f"--{name}: not with --trained, whose model follows trails of 3 signs; leave one out")
        lines = write_trained_demo(options.output, options.train, options.held_out, *common)
    else:
        lines = write_demo(
            options.output, options.train, options.held_out, options.grid, options.size, *common, options.operations,
            options.signs, options.family,
        )  # fmt: skip
    print("\n".join(lines))
    return 0
