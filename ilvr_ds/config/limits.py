"""What a recipe's values may be: the range of every number, and settings that exclude each other."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from ilvr_ds.config.data_sections import DataConfig
from ilvr_ds.config.recipe import Recipe
from ilvr_ds.config.sections import ModelConfig
from ilvr_ds.errors import UserError, nearest

LIMITS: dict[str, tuple[float, float]] = {
    "run.seed": (0, 2**32 - 1),
    "run.stop_exit_code": (0, 255),
    "run.rank_timeout_s": (1.0, 86400.0),
    "run.stall_timeout_s": (1.0, 864000.0),
    "data.lanes": (1, 2**20),
    "data.shuffle_buffer": (1, 2**24),
    "data.max_tokens": (1, 2**20),
    "data.max_image_pixels": (56 * 56, 2**26),
    "data.num_workers": (0, 256),
    "data.max_bad_fraction": (0.0, 1.0),
    "model.latent_size": (1, 1024),
    "model.lora_rank": (0, 4096),
    "model.lora_alpha": (1e-6, 1e6),
    "teacher.momentum": (0.0, 1.0),
    "teacher.max_tokens": (1, 2**24),
    "selection.group_size": (1, 2**16),
    "selection.top_p": (1e-6, 1.0),
    "selection.temperature": (1e-6, 1e6),
    "selection.pool_size": (0, 2**16),
    "selection.pool_min": (0, 2**16),
    "loss.ce_weight": (0.0, 1e6),
    "loss.align_weight": (0.0, 1e6),
    "loss.contrastive_weight": (0.0, 1e6),
    "loss.contrastive_temperature": (1e-6, 1e6),
    "loss.target_noise_std": (0.0, 1e6),
    "loss.logits_chunk": (1, 2**24),
    "optim.lr": (0.0, 1e3),
    "optim.beta1": (0.0, 0.999999),
    "optim.beta2": (0.0, 0.999999),
    "optim.eps": (1e-30, 1.0),
    "optim.weight_decay": (0.0, 1e3),
    "optim.warmup_steps": (0, 2**31),
    "optim.min_lr_ratio": (0.0, 1.0),
    "optim.max_grad_norm": (0.0, 1e9),
    "train.epochs": (1, 2**20),
    "train.max_steps": (0, 2**31),
    "train.latent_gradient": (1, 2**16),
    "train.micro_batch_size": (1, 2**16),
    "train.grad_accum_steps": (1, 2**16),
    "train.micro_batch_tokens": (0, 2**24),
    "train.patience": (0, 2**31),
    "train.max_skipped_steps": (1, 2**31),
    "evaluation.every_steps": (0, 2**31),
    "evaluation.max_samples": (1, 2**31),
    "evaluation.generate_samples": (0, 4096),
    "checkpoint.every_steps": (0, 2**31),
    "checkpoint.keep_last": (0, 2**31),
    "checkpoint.keep_every": (0, 2**31),
    "tracking.every_steps": (1, 2**31),
    "tracking.pictures_every_steps": (0, 2**31),
    "tracking.picture_samples": (0, 16),
}
"""Smallest and largest value of each number."""


def check_combinations(recipe: Recipe, where: str) -> None:
    """Raise UserError, which begins with `where`, for the first settings that do not fit together."""
    for check in _CHECKS:
        for mistake in check(recipe):
            raise UserError(f"{where}: {mistake}")


def _check_run(recipe: Recipe) -> Iterator[str]:
    if "/" in recipe.run.name or recipe.run.name in ("", ".", ".."):
        yield f"run.name '{recipe.run.name}' is not a plain folder name"


def _check_features(recipe: Recipe) -> Iterator[str]:
    data = recipe.data
    if data.is_mixture:
        yield from _check_mixture(data)
        return
    if (data.features is None or data.eval_shards is None) and data.eval_features is not None:
        yield "data.eval_features needs data.features and data.eval_shards beside it; remove it"
    if data.features is not None and data.eval_shards is not None and data.eval_features is None:
        yield (
            "data.features is set, so there is no vision tower to evaluate with: set data.eval_features too "
            f"(ilvr-ds encode --shards {data.eval_shards} writes them), or data.eval_shards to null"
        )


def _check_mixture(data: DataConfig) -> Iterator[str]:
    """Stored features and held-out data of a mixture."""
    if data.features is not None:
        yield "data.features is that of one data set, but data.shards is a list: give each entry its features"
    if data.eval_features is not None and data.eval_shards is None:
        yield "data.eval_features needs data.eval_shards beside it; in a mixture each entry may have its own"
    own = [entry.name for entry in data.sets if entry.eval_shards is not None]
    if data.eval_shards is not None and own:
        yield f"data.eval_shards is set, and so are eval_shards of {', '.join(own)} in data.shards; keep one of both"
    without = [entry.name for entry in data.sets if entry.features is None]
    if data.has_features and without:
        names = ", ".join(without)
        yield f"data.shards: some sets have features, {names} none; ilvr-ds encode --shards PATH writes them"
    for entry in data.held_out_sets:
        if data.has_features != (entry.features is not None):
            where = f"the entry {entry.name} of data.shards" if entry.name else "data"
            verb = "give" if data.has_features else "remove"
            yield f"features of training and held-out data go together: {verb} eval_features of {where}"


def _check_losses(recipe: Recipe) -> Iterator[str]:
    loss = recipe.loss
    if loss.ce_weight == loss.align_weight == loss.contrastive_weight == 0:
        yield "loss.ce_weight, loss.align_weight and loss.contrastive_weight are all 0"


def _check_selection(recipe: Recipe) -> Iterator[str]:
    selection, latents = recipe.selection, recipe.model.latent_size
    if selection.by == "change" and selection.pool != "changed":
        yield f"selection.by is change, but selection.pool is {selection.pool}; set it to changed"
    if selection.compare == "nearest" and selection.pool != "changed":
        yield f"selection.compare is nearest, but selection.pool is {selection.pool}; set it to changed"
    if selection.unchanged == "none" and selection.by != "change":
        yield (
            f"selection.unchanged is none, but selection.by is {selection.by}, which needs the teacher's query for "
            "every picture; set it to change"
        )
    if 0 < selection.pool_size < latents:
        yield (
            f"selection.pool_size is {selection.pool_size}, less than model.latent_size {latents}; 0 takes "
            f"{2 * latents}"
        )
    if selection.pool_min > (limit := selection.pool_limit(latents)):
        yield f"selection.pool_min is {selection.pool_min}, but a pool holds at most {limit}; lower it"


def _check_packing(recipe: Recipe) -> Iterator[str]:
    has_whole_chain = recipe.train.has_whole_chain
    if recipe.train.micro_batch_tokens and not recipe.packs:
        rows = "stage 2 with train.latent_gradient full has rows of its own"
        why = rows if has_whole_chain else "data.packing is false"
        yield f"train.micro_batch_tokens fills packed rows, but {why}; set it to 0"
    if recipe.model.attention == "varlen" and not recipe.packs and not has_whole_chain:
        yield "model.attention is varlen, but data.packing is false; valid: auto, sdpa"


def _check_adapters(recipe: Recipe) -> Iterator[str]:
    model, valid = recipe.model, ModelConfig.lora_targets
    for name in model.lora_targets:
        if name not in valid:
            hint = f"{nearest(name, valid)}; valid: {', '.join(valid)}"
            yield f"model.lora_targets: no linear layer '{name}'{hint}"
    if model.lora_base != "full" and not model.lora_rank:
        yield f"model.lora_base is {model.lora_base}, but all weights are trained; set model.lora_rank"


def _check_rollout(recipe: Recipe) -> Iterator[str]:
    if recipe.train.has_whole_chain and recipe.model.activation_checkpointing == "selective":
        yield (
            "model.activation_checkpointing is selective, which stage 2 with train.latent_gradient full does not have; "
            "valid: none, full"
        )
    if recipe.train.has_whole_chain and recipe.model.attention not in ("auto", "sdpa"):
        yield (
            f"model.attention is {recipe.model.attention}, but stage 2 with train.latent_gradient full computes on "
            "PyTorch's SDPA; valid: auto, sdpa"
        )


def _check_best(recipe: Recipe) -> Iterator[str]:
    best, evaluation = recipe.checkpoint.keep_best, recipe.evaluation
    if best != "none" and not recipe.data.held_out_sets:
        yield f"checkpoint.keep_best is {best}, but data.eval_shards is null: nothing is evaluated"
    if recipe.train.patience and best == "none":
        yield "train.patience needs checkpoint.keep_best, which says what counts as better"
    if recipe.train.patience and not evaluation.every_steps:
        yield "train.patience counts evaluations, but evaluation.every_steps is 0: there is one at the end only"


def _check_generation(recipe: Recipe) -> Iterator[str]:
    count = recipe.evaluation.generate_samples
    if count and not recipe.data.held_out_sets:
        yield f"evaluation.generate_samples is {count}, but data.eval_shards is null; set it, or 0"
    if count and recipe.data.has_features:
        yield f"evaluation.generate_samples is {count}, but with stored features no tower sees a prompt; set it to 0"


_CHECKS: tuple[Callable[[Recipe], Iterator[str]], ...] = (
    _check_run,
    _check_features,
    _check_losses,
    _check_selection,
    _check_packing,
    _check_adapters,
    _check_rollout,
    _check_best,
    _check_generation,
)
