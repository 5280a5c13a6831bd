"""Records of runs: `mlflow-sync`, `ui`, `compare`."""

from __future__ import annotations

import argparse
from pathlib import Path

from ilvr_ds.cli.options import Commands


def add_mlflow_sync(commands: Commands) -> None:
    """The options of `mlflow-sync`."""
    command = commands.add_parser("mlflow-sync", help="send to MLflow what a run could not send while it ran")
    command.add_argument("directory", type=Path, metavar="RUN_DIR", help="folder of the run")
    command.add_argument("--uri", help="tracking address instead of the run's own")
    command.set_defaults(run=_mlflow_sync)


def _mlflow_sync(options: argparse.Namespace) -> int:
    from ilvr_ds.tracking.mlflow_sync import sync

    for line in sync(options.directory, options.uri):
        print(line)
    return 0


def add_ui(commands: Commands) -> None:
    """The options of `ui`."""
    command = commands.add_parser("ui", help="start MLflow's pages on this machine and say where the charts are")
    command.add_argument(
        "directory", type=Path, nargs="?", default=Path("outputs"), metavar="FOLDER",
        help="folder of the runs, or of one run (default outputs)",
    )  # fmt: skip
    command.add_argument("--experiment", help="whose charts (default: that of the newest run)")
    command.add_argument("--port", type=int, default=5000, help="on 127.0.0.1 (default 5000)")
    command.set_defaults(run=_ui)


def _ui(options: argparse.Namespace) -> int:
    from ilvr_ds.tracking.ui import show

    return show(options.directory, options.experiment, options.port, lambda line: print(line, flush=True))


def add_compare(commands: Commands) -> None:
    """The options of `compare`."""
    command = commands.add_parser("compare", help="runs side by side: settings that differ and last metrics")
    command.add_argument("runs", type=Path, nargs="+", metavar="RUN_DIR", help="folder of a run")
    command.set_defaults(run=_compare)


def _compare(options: argparse.Namespace) -> int:
    from ilvr_ds.tracking.compare import compare

    print("\n".join(compare(options.runs)))
    return 0
