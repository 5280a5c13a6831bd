"""Whether a job can go on from a checkpoint: same batch, same base, same settings where state depends on them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ilvr_ds import dist
from ilvr_ds.checkpoint.files import saved_state, teacher_file
from ilvr_ds.checkpoint.layout import saved_layout
from ilvr_ds.config import Recipe
from ilvr_ds.errors import UserError, counted

TOWER, LAYERS = "vision tower", "layers in 4 bits"
"""What may be frozen and in no checkpoint."""
_FIXED = (
    "train.stage",
    "train.precision",
    "model.latent_size",
    "model.lora_rank",
    "model.lora_base",
    "model.lora_targets",
    "optim.name",
)
_FREE = (
    "run.",
    "evaluation.",
    "checkpoint.",
    "tracking.",
    "data.shards",
    "data.eval_shards",
    "data.num_workers",
    "model.cuda_graphs",
)


def check_fits(path: Path, recipe: Recipe, world: int | None = None) -> dict[str, Any]:
    """What `state.json` of a checkpoint says, if this job can go on from it; warns of settings that changed since
    (collective).

    world: ranks of the job, where they are not here. Raises UserError for another batch, or other settings that
    weights, samples or optimizer state depend on.
    """
    state = saved_state(path)
    state["layout"] = dist.decided_by_main(lambda: saved_layout(path, state))
    _check_batch(path, recipe, state["loader"]["samples per step"], world or dist.world_size())
    check_base_is_the_same(path, state["recipe"]["model"], recipe)
    now = recipe.flat()
    before = Recipe().flat()  # a key that came later: its default is what was done before, but for these
    before |= {"model.lora_base": "full", "train.gradient_precision": "model"}
    before["train.latent_gradient"] = "full" if recipe.train.has_free_latents else recipe.train.latent_gradient
    before |= {f"{section}.{key}": value for section, keys in state["recipe"].items() for key, value in keys.items()}
    changed = [key for key in now if before.get(key) != now[key] and not key.startswith(_FREE)]
    was = {key: f"{key} = {before.get(key)}, this run has {now[key]}" for key in changed}
    scale = ("model.lora_alpha",) if recipe.model.lora_rank else ()
    for key in changed:
        if key in (*_FIXED, *scale):
            raise UserError(f"{path}: made with {was[key]}; go on with the old value, or take another run.name")
    if recipe.has_teacher and teacher_file(0) not in state["files"]:
        raise UserError(_no_average(path, before))
    for key in changed:
        dist.warn("going on with other settings: the checkpoint was made with %s", was[key])
    return state


def _no_average(path: Path, before: dict[str, Any]) -> str:
    """What to say of a checkpoint without the average that a run's teacher needs; before: its recipe, flat."""
    without = "selection.unchanged=none"
    if before["selection.unchanged"] == "query":  # then no loss asked for targets
        without = (
            "loss.align_weight=0 and loss.contrastive_weight=0 (and, if it is older than that key, "
            "train.latent_gradient=full)"
        )
    return f"{path}: made without a teacher; go on with {without}, or name it in model.init_from of another run.name"


def check_frozen_is_the_same(path: Path, found: dict[str, str], model: str) -> None:
    """Raise UserError where frozen weights that no checkpoint holds are others than those that a checkpoint was made
    with. found: their fingerprints, by what they are; model: the folder that they come from."""
    before = saved_state(path).get("frozen", {})  # checkpoints from before it was kept
    for what in before.keys() & found.keys():
        if before[what] != found[what]:
            raise UserError(
                f"{path}: made with another {what} than {model} holds now, and checkpoints do not hold it: give the "
                "model of then as model.path"
            )


def commit_of_base(path: Path | None, name: str) -> str | None:
    """The hub's commit of the model `name` that the run of a checkpoint has used, if it was of this name."""
    if path is None:
        return None
    state = saved_state(path)
    commit: str | None = state.get("model_commit")
    return commit if state["recipe"]["model"]["path"] == name else None


def check_base_is_the_same(path: Path, before: dict[str, Any], recipe: Recipe) -> None:
    """Raise UserError where a base in 4 bits, which no checkpoint holds, may be another than a checkpoint's `model`."""
    model = recipe.model
    if model.lora_base == "full":
        return
    if model.random_init:
        raise UserError(f"{path}: model.random_init drew a base for model.lora_base {model.lora_base}, stored nowhere")
    if before["path"] != model.path:
        raise UserError(
            f"{path}: made with model.path = {before['path']}, this run has {model.path}; with model.lora_base "
            f"{model.lora_base} checkpoints do not hold the base: give the same path"
        )


def _check_batch(path: Path, recipe: Recipe, wanted: int, ranks: int) -> None:
    """The samples of each step must stay the same, whatever the number of ranks."""
    micro = recipe.train.micro_batch_size
    if micro * recipe.train.grad_accum_steps * ranks == wanted:
        return
    advice = "take a micro-batch and a number of ranks whose product divides it"
    if wanted % (micro * ranks) == 0:
        advice = f"set train.grad_accum_steps={wanted // (micro * ranks)}"
    raise UserError(
        f"{path}: made with {wanted} samples a step, this job has {counted(ranks, 'rank')} x "
        f"train.micro_batch_size {micro} x train.grad_accum_steps {recipe.train.grad_accum_steps}; {advice}"
    )
