"""Folders that are written under another name until they are whole, and what killed writers left of them.

`writer.json` in such a folder names the process that writes it; without it nobody can know whether it still does.
"""

from __future__ import annotations

import glob
import logging
import shlex
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ilvr_ds.owner import Owner, named, read_owner
from ilvr_ds.whole_files import partial_name

logger = logging.getLogger("ilvr_ds")
FILE = "writer.json"


@contextmanager
def unfinished_folder(to: Path) -> Iterator[Path]:
    """A new folder beside `to` to write into and to rename; removed at the end of the block where it still stands.

    What dead writers of the same name left is removed before, for room. Raises OSError.
    """
    _clear(to)
    folder = partial_name(to)
    try:
        folder.mkdir(parents=True)
        (folder / FILE).write_text(Owner().to_text())
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def finish(folder: Path, to: Path) -> None:
    """Give it its name. Raises OSError."""
    (folder / FILE).unlink()
    folder.rename(to)


def _clear(to: Path) -> None:
    """Remove what is certainly abandoned, and name the rest with the command that removes it."""
    mine = Owner()
    for other in sorted(to.parent.glob(f"{glob.escape(to.name)}.partial-*")):
        owner = read_owner(other / FILE) if (other / FILE).is_file() else None
        if owner is not None and owner.is_dead_for(mine):
            shutil.rmtree(other, ignore_errors=True)
        if not other.exists():
            logger.warning("%s: removed; %s was killed while it wrote it", other, named(owner))
            continue
        logger.warning(
            "%s: written by %s, which was killed or still runs; if it does not: rm -r %s",
            other, named(owner), shlex.quote(str(other)),
        )  # fmt: skip
