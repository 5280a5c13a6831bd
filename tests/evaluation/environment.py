"""Environments of tests that need other packages than ours."""

from __future__ import annotations

import subprocess
import sys
import sysconfig
from pathlib import Path


def borrowing_environment(folder: Path) -> Path:
    """A new virtual environment that falls back on the packages of this one, torch above all; returns its bin."""
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    packages = next((folder / "lib").glob("python*/site-packages"))
    (packages / "borrowed.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return folder / "bin"


def pip_install(bin: Path, *packages: str, env: dict[str, str]) -> subprocess.CompletedProcess[str]:
    """Without compiling: a test imports a small part of what it installs."""
    command = [str(bin / "pip"), "install", "-q", "--no-compile", *packages]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=env)
