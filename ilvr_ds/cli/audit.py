"""`audit`."""

from __future__ import annotations

import argparse

from ilvr_ds.cli.answering import add_answering, evaluation_settings, run_answering
from ilvr_ds.cli.options import Commands, add_command


def add_audit(commands: Commands) -> None:
    """The options of `audit`."""
    command = add_command(commands, "audit", "does a model use its latents? resumes where it was killed", "audit.md")
    add_answering(command, "audit-BENCHMARK", "--samples")
    command.add_argument(
        "--tests", default="replacement,donor,inside,barred", metavar="NAME[,NAME]",
        help="some of replacement, donor, inside, barred (default: all)",
    )  # fmt: skip
    command.add_argument(
        "--set", action="append", default=[], metavar="selection.KEY=VALUE",
        help="how targets are selected (default: as the run that `export` noted in the model)",
    )  # fmt: skip
    command.set_defaults(run=_audit)


def _audit(options: argparse.Namespace) -> int:
    from ilvr_ds.audit.command import audit
    from ilvr_ds.audit.settings import AuditSettings, parse_tests

    tests = parse_tests(options.tests)
    settings = AuditSettings(evaluation_settings(options, mode="latent"), tests, tuple(options.set))
    return run_answering(options, lambda: audit(settings))
