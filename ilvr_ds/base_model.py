"""The base model's files, where a thousand ranks want them at the same time."""

from __future__ import annotations

from pathlib import Path

from ilvr_ds import dist
from ilvr_ds.model.hub import model_folder


def model_on_host(path: str) -> str:
    """The folder of the model at `path` (folder or hub name) on this rank's host (collective).

    The main rank asks the hub for the newest version, the first rank of each host downloads that one, and the others
    wait and then read the disk. Raises UserError, on every rank, where one of them cannot have it.
    """
    commit = dist.decided_by_main(lambda: None if Path(path).is_dir() else Path(model_folder(path)).name)
    if commit is None:
        return path
    return dist.first_on_host(lambda is_first: model_folder(path, commit, is_here=not is_first))
