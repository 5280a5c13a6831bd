"""The `ilvr-ds` command: parses, wires, calls.

Each file has one command, or a few of one subject: its options, and the function that runs it. A command imports what
it needs when it runs, so that the others, and `--help`, start fast.
"""

from __future__ import annotations

import argparse
import atexit
import errno
import logging
import os
import select
import signal
import sys
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from ilvr_ds import __version__, launcher, shipped
from ilvr_ds.cli.audit import add_audit
from ilvr_ds.cli.completion import complete_if_asked
from ilvr_ds.cli.data import add_encode, add_inspect, add_pack
from ilvr_ds.cli.demo_data import add_demo_data
from ilvr_ds.cli.doctor import add_doctor
from ilvr_ds.cli.evaluate import add_evaluate
from ilvr_ds.cli.export import add_export
from ilvr_ds.cli.generate import add_generate
from ilvr_ds.cli.plan import add_plan
from ilvr_ds.cli.serve import add_serve
from ilvr_ds.cli.settings import add_settings
from ilvr_ds.cli.tracking import add_compare, add_mlflow_sync, add_ui
from ilvr_ds.cli.train import add_train
from ilvr_ds.errors import RunError, UserError

logger = logging.getLogger("ilvr_ds")
USER_ERROR = 2
RUN_ERROR = 1
GRACE_S = 5.0
"""Ranks other than the main one wait this long before they print a user's mistake: its line is mostly the same."""
_UNWRITABLE = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG)
"""Full disks, quotas, read-only file systems: most commands name the file themselves, and all end in one line."""
_COMMANDS = (
    add_doctor,
    add_plan,
    add_demo_data,
    add_pack,
    add_inspect,
    add_encode,
    add_settings,
    add_train,
    add_ui,
    add_compare,
    add_mlflow_sync,
    add_export,
    add_generate,
    add_evaluate,
    add_audit,
    add_serve,
)
"""In the order of `--help`, which is that in which they are needed."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command. Returns the exit code; 2 is a mistake that the user can mend, said in one line."""
    parser = _parser()
    complete_if_asked(parser)
    options = parser.parse_args(arguments)
    rank = 0
    try:
        if options.by_ranks:
            rank = launcher.find_place(os.environ).rank
        _set_up_logging(rank)
        _quieten_deepspeed(options.command == "train")
        if getattr(options, "config", None):
            options.config = shipped.find_recipe(options.config)
        _check_paths(options)
        return int(options.run(options))
    except UserError as error:
        return _mistake(rank, str(error))
    except RunError as error:
        print(f"[rank {rank}] ilvr-ds: error: {error}", file=sys.stderr, flush=True)
        return RUN_ERROR
    except OSError as error:
        if error.errno not in _UNWRITABLE:
            raise
        what = f"{error.filename} cannot be written" if error.filename else "a file cannot be written"
        return _mistake(rank, f"{options.command}: {what} ({error.strerror})")


def _check_paths(options: argparse.Namespace) -> None:
    """Raise UserError for `--to=~/model`, where no shell has put a folder for ~: one of that name would be made."""
    for name, value in vars(options).items():
        if isinstance(value, Path) and value.parts[:1] == ("~",):
            option = f"--{name.replace('_', '-')}"
            raise UserError(f"{option}={value}: ~ is a shell's; write {option} {value}, or the whole path")


def _mistake(rank: int, what: str) -> int:
    """Say a user's mistake in one line. Returns the exit code."""
    if rank:
        time.sleep(GRACE_S)
    prefix = f"[rank {rank}] " if rank else ""
    print(f"{prefix}ilvr-ds: error: {what}", file=sys.stderr, flush=True)
    return USER_ERROR


def run(arguments: Sequence[str] | None = None) -> NoReturn:
    """`main` as a process, which ends without the interpreter's shutdown.

    gloo's threads live as long as anything refers to their process group, and DeepSpeed does to the end. A thread that
    releases a tensor while the interpreter shuts down aborts the process, after a run that went well. After Ctrl-C, and
    where nobody reads on (`| head`), it ends as by the signal, so that a shell's loop ends too.
    """
    _open_streams()
    code, ended_by = 0, None
    try:
        code = main(arguments)
    except KeyboardInterrupt:
        ended_by = signal.SIGINT
        print("ilvr-ds: interrupted", file=sys.stderr)
    except BrokenPipeError:
        if not _is_unread():
            raise
    atexit._run_exitfuncs()
    try:
        sys.stdout.flush()
    except OSError as error:
        if not _is_unread():
            code = _mistake(0, f"standard output cannot be written ({error.strerror})")
    if not code and _is_unread():
        ended_by = ended_by or signal.SIGPIPE
    sys.stderr.flush()
    if ended_by:
        signal.signal(ended_by, signal.SIG_DFL)
        os.kill(os.getpid(), ended_by)
    os._exit(code)


def _open_streams() -> None:
    """Standard output and error take every letter, whatever the locale knows, also where they were closed."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, Path(os.devnull).open("w"))  # noqa: SIM115 (to the end of the process)
        getattr(sys, name).reconfigure(errors="backslashreplace")


def _is_unread() -> bool:
    """Whether standard output is a pipe whose reader is gone."""
    poll = select.poll()
    poll.register(sys.stdout.fileno(), 0)
    return any(event & select.POLLERR for _, event in poll.poll(0))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="ilvr-ds",
        description="Train interleaved latent visual reasoning.",
        epilog="ilvr-ds COMMAND --help has a command's options, docs/README.md all pages; `make demo` shows it all.",
    )
    parser.add_argument("--version", action="version", version=f"ilvr_ds {__version__}")
    parser.set_defaults(by_ranks=False)  # True for a command that launchers start once per rank
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for add in _COMMANDS:
        add(commands)
    return parser


def _set_up_logging(rank: int) -> None:
    """Plain lines on standard error: everything from the main rank, warnings with their rank from the others."""
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(message)s" if rank == 0 else f"[rank {rank}] %(message)s"))
    logger.addHandler(handler)
    logger.setLevel(logging.INFO if rank == 0 else logging.WARNING)
    logger.propagate = False
    # users can do nothing about deprecations between torch, transformers and DeepSpeed
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")


def _quieten_deepspeed(trains: bool) -> None:
    """Keep its warnings for training, where they matter; ranks, and `doctor`, say themselves that there is no GPU."""
    least = logging.WARNING if trains else logging.ERROR
    logging.getLogger("DeepSpeed").addFilter(
        lambda record: record.levelno >= least and not record.getMessage().startswith("Setting accelerator to CPU")
    )
