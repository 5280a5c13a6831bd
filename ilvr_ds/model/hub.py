"""Models by name: their files on this machine."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import snapshot_download

from ilvr_ds.errors import UserError, first_line

_FILES = ["*.safetensors", "*.bin", "*.json", "*.txt", "*.jinja"]


def model_folder(path: str, commit: str | None = None, *, is_here: bool = False) -> str:
    """The folder of a model: `path` itself, or the hub's model of this name, downloaded where it is not here yet.

    commit: the hub's revision; None: the newest, or without a network the newest that is here. is_here: it has been
    downloaded, so the hub is not asked. Raises UserError where the model cannot be had.
    """
    if Path(path).is_dir():
        return path
    try:
        return snapshot_download(path, revision=commit, allow_patterns=_FILES, local_files_only=is_here)
    except (OSError, ValueError) as error:
        what = f"'{path}', commit {commit}" if commit else f"'{path}'"
        raise UserError(f"model.path: no model at {what} ({first_line(error)})") from error
