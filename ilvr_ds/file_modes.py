"""File permissions: what the umask says, even if a library sets others."""

from __future__ import annotations

from pathlib import Path
from stat import S_IMODE


def follow_umask(file: Path) -> None:
    """Give a file the mode of any new file; safetensors lets only the owner read its files (0600).

    A probe file beside it shows the mode: reading the umask means setting it, for all threads. Raises OSError.
    """
    probe = file.with_name(f"{file.name}.mode")
    probe.touch()
    mode = S_IMODE(probe.stat().st_mode)
    probe.unlink()
    if S_IMODE(file.stat().st_mode) != mode:
        file.chmod(mode)
