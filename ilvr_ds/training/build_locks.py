"""Locks that killed builds left behind.

DeepSpeed compiles its operators at first use, under a lock file that holds no process number. A process killed
meanwhile leaves it, and every later start would wait for it in silence, for ever.
"""

from __future__ import annotations

import os
import time
from pathlib import Path

from torch.utils.cpp_extension import get_default_build_root

from ilvr_ds import dist

STALE_S = 900
"""Age in seconds at which nobody holds a lock any more; DeepSpeed's operators compile in about a minute."""


def clear_stale_locks() -> None:
    """Delete old locks of builds in torch's extension cache, and name those that this start will wait for."""
    root = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or get_default_build_root())
    for lock in (*root.glob("*/lock"), *root.glob("*/*/lock")):
        try:
            age = time.time() - lock.stat().st_mtime
        except FileNotFoundError:  # its build has just ended, or another rank was here
            continue
        if age > STALE_S:
            lock.unlink(missing_ok=True)
            dist.warn("deleted %s: a build that was killed left it %.0f minutes ago", lock, age / 60)
        else:
            dist.warn("another process compiles; if none does, delete %s, or this job waits for ever", lock)
