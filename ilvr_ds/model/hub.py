"""Models by name: their files on this machine."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import snapshot_download

from ilvr_ds.errors import UserError

_FILES = ["*.safetensors", "*.bin", "*.json", "*.txt", "*.jinja"]


def model_folder(path: str, commit: str | None = None, *, is_here: bool = False) -> str:
    """The folder of a model: `path` itself, or what the hub has under this name, downloaded where it is not here yet.

    commit: as the hub names a version; None: the newest, or without a network the newest that is here. is_here: it was
    downloaded before, the hub need not be asked. Raises UserError where it cannot be had.
    """
    if Path(path).is_dir():
        return path
    try:
        return snapshot_download(path, revision=commit, allow_patterns=_FILES, local_files_only=is_here)
    except (OSError, ValueError) as error:
        what = f"'{path}', commit {commit}" if commit else f"'{path}'"
        raise UserError(f"model.path: no model at {what} ({str(error).strip().splitlines()[0]})") from error
