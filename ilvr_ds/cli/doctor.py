"""`doctor`."""

from __future__ import annotations

import argparse

from ilvr_ds.cli.options import Commands, add_command


def add_doctor(commands: Commands) -> None:
    """The options of `doctor`."""
    command = add_command(commands, "doctor", "what this machine has, what is missing, how to get it", "install.md")
    command.add_argument(
        "--cluster", dest="by_ranks", action="store_true", help="compare all ranks; start it as you start train"
    )
    command.add_argument("--shards", help="data set to check, every byte; with --cluster every rank reads a part")
    command.set_defaults(run=_doctor)


def _doctor(options: argparse.Namespace) -> int:
    from ilvr_ds import doctor

    if options.by_ranks:
        from ilvr_ds import cluster, dist

        rows, checks = cluster.examine(options.shards)
        if dist.is_main():
            print("\n".join(rows))
            print(doctor.render(checks))
        dist.barrier()
        dist.close()
    else:
        checks = [*doctor.report(), *([doctor.check_shards(options.shards)] if options.shards else [])]
        print(doctor.render(checks))
    return int(any(check.status == "bad" for check in checks))
