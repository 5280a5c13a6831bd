"""`export`."""

from __future__ import annotations

import argparse
from pathlib import Path

from ilvr_ds.cli.options import Commands, add_command
from ilvr_ds.errors import UserError


def add_export(commands: Commands) -> None:
    """The options of `export`."""
    command = add_command(
        commands, "export", "a run's weights as a model that stock transformers loads", "evaluation.md"
    )
    command.add_argument("source", type=Path, metavar="RUN_OR_CHECKPOINT", help="folder of a run or of a checkpoint")
    command.add_argument("--to", type=Path, required=True, help="folder to write")
    command.add_argument("--best", action="store_true", help="of a run: what checkpoint.keep_best kept, not the newest")
    command.add_argument("--adapters", choices=["merge", "apart"], default="merge", help="LoRA (default merge)")
    command.add_argument("--precision", choices=["fp32", "bf16", "fp16"], help="of the weights (default: the run's)")
    command.add_argument("--register", metavar="NAME", help="make it the next version of this model in MLflow")
    command.add_argument("--tracking-uri", help="MLflow for --register (default: the run's)")
    command.add_argument("--overwrite", action="store_true", help="replace a model at --to")
    command.set_defaults(run=_export)


def _export(options: argparse.Namespace) -> int:
    from ilvr_ds.evaluation.export import export

    if options.register is not None:
        from ilvr_ds.tracking.registry import check_name
        from ilvr_ds.tracking.scores import check_address

        check_name(options.register)
        if options.tracking_uri:
            check_address(options.tracking_uri)
    lines = export(options.source, options.to, options.adapters, options.precision, options.overwrite, options.best)
    if options.register:
        from ilvr_ds.tracking.registry import register

        try:
            lines.append(f"registered as {register(options.to, options.register, options.tracking_uri)}")
        except UserError as error:
            raise UserError(f"{error} (the model is whole in {options.to})") from error
    print("\n".join(lines))
    return 0
