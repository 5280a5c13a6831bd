"""The base model's files, downloaded once per host however many ranks need them."""

from __future__ import annotations

from pathlib import Path

from ilvr_ds import dist
from ilvr_ds.model.hub import model_folder


def model_on_host(path: str, pinned: str | None = None) -> str:
    """The folder of the model at `path` (folder or hub name) on this rank's host (collective).

    The main rank asks the hub for the newest commit, or for the one that is `pinned`. The first rank of each host
    downloads it; the others wait, then read it from disk. If one rank cannot get it, every rank raises UserError.
    """
    commit = dist.decided_by_main(lambda: commit_of(path, model_folder(path, pinned)))
    if commit is None:
        return path
    return dist.first_on_host(lambda is_first: model_folder(path, commit, is_here=not is_first))


def commit_of(path: str, folder: str) -> str | None:
    """The commit of a hub model downloaded to `folder`; None if `path` is a folder itself."""
    return None if Path(path).is_dir() else Path(folder).name
