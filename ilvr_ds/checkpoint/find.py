"""Which checkpoint a run resumes from, and what becomes of newer ones.

`auto` and `must` take the newest of the run. A path counts once: `resumed_from.json` in the run's folder remembers it,
so that a job which is requeued with the same arguments goes on from what it has saved since.
"""

from __future__ import annotations

import json
import logging
import re
from pathlib import Path
from typing import Any

from ilvr_ds import dist
from ilvr_ds.checkpoint.best import BEST_FILE, read_best
from ilvr_ds.checkpoint.files import STATE_FILE, first_fault, list_checkpoints, saved_state
from ilvr_ds.config import Recipe
from ilvr_ds.errors import UserError
from ilvr_ds.whole_files import write_whole

logger = logging.getLogger("ilvr_ds")
RESUMED_FILE = "resumed_from.json"
_WORDS = ("auto", "must", "never")


def find_checkpoint(recipe: Recipe) -> Path | None:
    """The checkpoint that `checkpoint.resume` asks for, or None to start anew (collective). Changes nothing.

    Every file is checked. Raises UserError with the file of a damaged checkpoint where that very one was asked for;
    else the one before it is taken.
    """
    folder = _folder(recipe)
    candidates = dist.decided_by_main(lambda: _candidates(recipe, folder))
    is_automatic = recipe.checkpoint.resume == "auto" or len(candidates) > 1
    for path in reversed(candidates):
        fault = first_fault(path)
        if fault is None:
            return path
        if not is_automatic:
            raise UserError(f"{fault}; take another checkpoint, or checkpoint.resume: auto for the newest intact one")
        dist.warn("%s; looking at the checkpoint before it", fault)
    if candidates:
        raise UserError(f"checkpoint.resume: no checkpoint in {folder} is intact; take another run.name to start anew")
    return None


def next_checkpoint(recipe: Recipe) -> Path | None:
    """The checkpoint that `find_checkpoint` would look at first: for a dry run, which does not read its files.

    Raises UserError where `checkpoint.resume` asks for one that is not there.
    """
    return next(reversed(_candidates(recipe, _folder(recipe))), None)


def branches_off(recipe: Recipe) -> bool:
    """Whether `checkpoint.resume` is a path that this run has not resumed from yet: it branches off there."""
    wanted = recipe.checkpoint.resume
    return wanted not in _WORDS and _remembered(recipe) != str(Path(wanted).resolve())


def is_of_run(recipe: Recipe, path: Path) -> bool:
    """Whether a checkpoint lies in this run's own folder."""
    return path.resolve().parent == _folder(recipe).resolve()


def set_aside_newer(recipe: Recipe, path: Path) -> None:
    """Set aside the run's checkpoints that do not lead to `path` (main rank only): the run branches off there.

    They are deleted when the run has come as far again (files.py, remove_old). If the best was among them, none is
    named any more: the run will have another checkpoint of that step. Raises UserError.
    """
    is_own = is_of_run(recipe, path)
    best = read_best(_folder(recipe))
    if best is not None and not (is_own and best["step"] <= _step(path)):
        (_folder(recipe) / BEST_FILE).unlink()
    for other in list_checkpoints(_folder(recipe)):
        if is_own and (other.name == path.name or _step(other) < _step(path)):
            continue
        number = 1
        while (aside := other.with_name(f"{other.name}.aside-{number}")).exists():
            number += 1
        try:
            other.rename(aside)
        except OSError as error:
            raise UserError(f"{other}: cannot be renamed to {aside.name} ({error.strerror})") from error
        logger.warning("going on from %s: %s is now %s", path.name if is_own else path, other.name, aside.name)


def remember(recipe: Recipe, path: Path | None) -> None:
    """Write down that the run resumes from the path it was given (main rank only); None: it starts anew."""
    file, wanted = recipe.run_dir / RESUMED_FILE, recipe.checkpoint.resume
    try:
        if path is None:
            file.unlink(missing_ok=True)
        elif branches_off(recipe):
            file.parent.mkdir(parents=True, exist_ok=True)
            write_whole(file, json.dumps({"path": str(Path(wanted).resolve()), "step": _step(path)}) + "\n")
    except OSError as error:
        raise UserError(f"{file}: cannot be written ({error.strerror})") from error


def _folder(recipe: Recipe) -> Path:
    return recipe.run_dir / "checkpoints"


def _candidates(recipe: Recipe, folder: Path) -> list[Path]:
    """Checkpoints that a start may resume from, oldest first."""
    wanted = recipe.checkpoint.resume
    found = list_checkpoints(folder)
    if wanted == "never":
        if found:
            raise UserError(f"checkpoint.resume is never, but {folder} holds checkpoints; take another run.name")
        return []
    if wanted in _WORDS:
        if not found and wanted == "must":
            raise UserError(f"checkpoint.resume is must, but {folder} holds no complete checkpoint")
        return found if wanted == "auto" else found[-1:]
    path = Path(wanted)
    if since := _saved_since(recipe, path, found):
        logger.info(
            "checkpoint.resume: this run has gone on from %s before, and goes on from %s; to go back once more, "
            "delete %s", path, since[-1].name, recipe.run_dir / RESUMED_FILE,
        )  # fmt: skip
        return [path, *since] if (path / STATE_FILE).is_file() else since
    if not (path / STATE_FILE).is_file():
        raise UserError(f"checkpoint.resume: '{wanted}' is not a checkpoint; valid: auto, must, never, or a folder")
    return [path]


def _saved_since(recipe: Recipe, path: Path, found: list[Path]) -> list[Path]:
    """The checkpoints that the run has saved since it resumed from `path`, if it has."""
    if branches_off(recipe):
        return []
    if not is_of_run(recipe, path):
        return found
    return [own for own in found if _step(own) > _step(path)]


def _remembered(recipe: Recipe) -> str | None:
    file = recipe.run_dir / RESUMED_FILE
    try:
        content: Any = json.loads(file.read_text())
        return str(content["path"])
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{file}: cannot be read ({error}); delete it to go on from checkpoint.resume") from error


def _step(path: Path) -> int:
    """Steps done, by the folder's name, which those set aside keep, or else by its state."""
    named = re.match(r"step-(\d{8})", path.name)
    return int(named[1]) if named else int(saved_state(path)["step"])
