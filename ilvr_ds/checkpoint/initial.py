"""Which checkpoint of another run `model.init_from` means, and whether its weights fit."""

from __future__ import annotations

from pathlib import Path

from ilvr_ds import dist
from ilvr_ds.checkpoint.compatible import check_base_is_the_same
from ilvr_ds.checkpoint.files import STATE_FILE, list_checkpoints, newest_intact, saved_state
from ilvr_ds.config import Recipe
from ilvr_ds.errors import UserError


def find_initial(recipe: Recipe) -> Path | None:
    """The checkpoint that `model.init_from` names, of a run the newest intact one, or None (collective).

    Raises UserError where it is none, is damaged, or does not fit.
    """
    wanted = recipe.model.init_from
    if wanted is None:
        return None
    candidates = dist.decided_by_main(lambda: _candidates(wanted))
    try:
        path = newest_intact(candidates)
    except UserError as error:
        raise UserError(f"model.init_from: {error}") from error
    dist.decided_by_main(lambda: _check_settings(path, recipe))
    return path


def next_initial(recipe: Recipe) -> Path | None:
    """The checkpoint that `find_initial` would look at first: for a dry run, which does not read its files.

    Raises UserError where it is none, or does not fit.
    """
    wanted = recipe.model.init_from
    if wanted is None:
        return None
    path = _candidates(wanted)[-1]
    _check_settings(path, recipe)
    return path


def _candidates(wanted: str) -> list[Path]:
    """The checkpoint of that name, or those of the run, oldest first."""
    candidates = list_checkpoints(Path(wanted) / "checkpoints") or [Path(wanted)]
    if not (candidates[-1] / STATE_FILE).is_file():
        raise UserError(
            f"model.init_from: '{wanted}' is neither a checkpoint nor the folder of a run that has one; "
            "expected RUN or RUN/checkpoints/step-00001000"
        )
    return candidates


def _check_settings(path: Path, recipe: Recipe) -> None:
    before = saved_state(path)["recipe"]["model"]
    now = recipe.to_dict()["model"]
    before.setdefault("lora_base", "full")  # checkpoints from before it was a key
    scale = ("lora_alpha",) if recipe.model.lora_rank else ()
    for key in ("latent_size", "lora_rank", "lora_base", "lora_targets", *scale):
        if before[key] != now[key]:
            raise UserError(f"model.init_from: {path} was made with model.{key} = {before[key]}, here it is {now[key]}")
    check_base_is_the_same(path, before, recipe)
