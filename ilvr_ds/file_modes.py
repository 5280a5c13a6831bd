"""Who may read a file: what the umask says, also where a library says otherwise."""

from __future__ import annotations

from pathlib import Path
from stat import S_IMODE


def follow_umask(file: Path) -> None:
    """Give a file the mode of one that is opened here; safetensors leaves its own to the owner alone (0600).

    Learnt from a file beside it: to ask for the umask is to set it, for all threads. Raises OSError.
    """
    probe = file.with_name(f"{file.name}.mode")
    probe.touch()
    mode = S_IMODE(probe.stat().st_mode)
    probe.unlink()
    if S_IMODE(file.stat().st_mode) != mode:
        file.chmod(mode)
