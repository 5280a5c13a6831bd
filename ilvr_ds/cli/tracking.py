"""Records of runs and evaluations: `mlflow-sync`, `ui`, `compare`."""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

from ilvr_ds.cli.options import Commands, add_command
from ilvr_ds.errors import UserError


def add_mlflow_sync(commands: Commands) -> None:
    """The options of `mlflow-sync`."""
    command = add_command(
        commands, "mlflow-sync", "send to MLflow what a run could not send while it ran", "tracking.md"
    )
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
    command = add_command(
        commands, "ui", "start MLflow's pages on this machine and say where the charts are", "tracking.md"
    )
    command.add_argument(
        "directory", type=Path, nargs="?", default=Path("outputs"), metavar="FOLDER",
        help="folder of the runs, or of one run (default outputs)",
    )  # fmt: skip
    command.add_argument("--experiment", help="whose charts (default: that of the newest run)")
    command.add_argument("--port", type=int, default=5000, help="port of the server (default 5000)")
    command.add_argument(
        "--host", default="127.0.0.1",
        help="address that it listens on (default 127.0.0.1: this machine alone; 0.0.0.0: a network, without a login)",
    )  # fmt: skip
    command.set_defaults(run=_ui)


def _ui(options: argparse.Namespace) -> int:
    from ilvr_ds.tracking.ui import show

    say = partial(print, flush=True)
    return show(options.directory, options.experiment, options.port, say, options.host)


def add_compare(commands: Commands) -> None:
    """The options of `compare`."""
    command = add_command(
        commands, "compare", "runs side by side, or models against benchmarks with intervals", "tracking.md"
    )
    command.add_argument(
        "folders", type=Path, nargs="+", metavar="FOLDER", help="of runs; or of evaluations, or models that have some"
    )
    scores = command.add_argument_group("of evaluations")
    scores.add_argument("--rule", action="append", default=[], help="rule set to show (default: each benchmark's main)")
    scores.add_argument("--markdown", type=Path, metavar="FILE", help="write the table there, too")
    scores.add_argument("--tracking-uri", help="MLflow for the table")
    scores.add_argument("--experiment", default="evaluation", help="MLflow experiment (default evaluation)")
    command.set_defaults(run=_compare)


def _compare(options: argparse.Namespace) -> int:
    from ilvr_ds.evaluation.finished import evaluations_in
    from ilvr_ds.tracking.compare import compare

    without = [folder for folder in options.folders if not evaluations_in(folder)]
    if not without:
        return _compare_scores(options)
    if len(without) < len(options.folders):
        raise UserError(f"{without[0]}: holds no evaluation, unlike the others; give either evaluations or runs")
    if options.rule or options.markdown or options.tracking_uri:
        raise UserError(f"{without[0]}: holds no evaluation, which --rule, --markdown and --tracking-uri are for")
    print("\n".join(compare(options.folders)))
    return 0


def _compare_scores(options: argparse.Namespace) -> int:
    from ilvr_ds.evaluation.comparison import compare_scores, markdown, send, terminal_lines

    table = compare_scores(options.folders, options.rule)
    text = markdown(table)
    if options.markdown:
        try:
            options.markdown.write_text(text, encoding="utf-8")
        except OSError as error:
            raise UserError(f"--markdown {options.markdown}: cannot be written ({error.strerror})") from error
    print("\n".join(terminal_lines(table)))
    if options.tracking_uri:
        with TemporaryDirectory() as scratch:
            file = Path(scratch) / "comparison.md"
            file.write_text(text, encoding="utf-8")
            send(table, options.tracking_uri, options.experiment, file)
    return 0
