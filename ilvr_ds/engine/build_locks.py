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
PAUSE_S = 0.5


def wait_for_builds() -> None:
    """Return when nobody compiles in torch's extension cache; a lock that is too old is deleted.

    What this process needs next is there then, or compiled by one rank of the host while the others wait for it.
    """
    root = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or get_default_build_root())
    told: set[Path] = set()
    while locks := {lock: age for lock in (*root.glob("*/lock"), *root.glob("*/*/lock")) if (age := _age_s(lock))}:
        for lock, age in locks.items():
            if age > STALE_S:
                lock.unlink(missing_ok=True)
                dist.warn("deleted %s: a build that was killed left it %.0f minutes ago", lock, age / 60)
            elif lock not in told:
                left = (STALE_S - age) / 60
                dist.warn("another process compiles; if none does, delete %s, or wait %.0f minutes", lock, left)
                told.add(lock)
        time.sleep(PAUSE_S)


def _age_s(lock: Path) -> float | None:
    """None: it is gone, for its build has just ended, or another rank was here."""
    try:
        return max(time.time() - lock.stat().st_mtime, PAUSE_S)
    except FileNotFoundError:
        return None
