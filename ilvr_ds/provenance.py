"""What produced a result: commit, package versions, machine, command."""

from __future__ import annotations

import os
import platform
import shlex
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from ilvr_ds import __version__

FLASH_ATTN = ("flash-attn", "flash-attn-3", "flash-attn-4")
"""The packages of its major versions."""
PACKAGES = (
    "torch",
    "transformers",
    "deepspeed",
    "webdataset",
    "mlflow-skinny",
    "peft",
    "bitsandbytes",
    *FLASH_ATTN,
    "liger-kernel",
)
_GIT_TIMEOUT_S = 10
UNKNOWN = "unknown"


def commit() -> tuple[str, bool]:
    """Commit of the running code, and whether tracked files differ from it; ("unknown", False) outside a checkout."""
    found = _git("rev-parse", "HEAD")
    return (found, bool(_git("status", "--porcelain", "--untracked-files=no"))) if found else (UNKNOWN, False)


def versions() -> dict[str, str]:
    """Versions of Python, of this package, and of those `PACKAGES` that are installed."""
    packages = {name: found for name in PACKAGES if (found := installed(name))}
    return {"python": platform.python_version(), "ilvr_ds": __version__, **packages}


def installed(package: str) -> str | None:
    """Version of a package; None if it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def command_line() -> str:
    """The command of this process, quoted for a shell."""
    return shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])


def machine(device: torch.device) -> dict[str, str]:
    """Names of this process's host and device."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {os.cpu_count()} cores"
    return {"host": platform.node(), "device": name}


def environment(machines: list[dict[str, str]]) -> dict[str, Any]:
    """All of the above as plain values. machines: those of all ranks."""
    found, is_dirty = commit()
    return {
        "git_commit": found,
        "git_dirty": is_dirty,
        "versions": versions(),
        "cuda": torch.version.cuda,
        "ranks": machines,
        "command": command_line(),
    }


def _git(*arguments: str) -> str:
    try:
        found = subprocess.run(
            ["git", *arguments], cwd=Path(__file__).parent, capture_output=True, text=True, check=False,
            timeout=_GIT_TIMEOUT_S,
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return found.stdout.strip() if found.returncode == 0 else ""
