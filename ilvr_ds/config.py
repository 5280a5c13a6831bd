"""The recipe: every setting of a run, typed, documented and checked.

A recipe is a YAML file with the sections below; `--set section.key=value` overrides single values.
An unknown key, a wrong type or a value out of range is a `UserError` that names file, line and key.
ZeRO, offload and communication stand in the DeepSpeed JSON that `deepspeed.config` names, and only there.
"""

from __future__ import annotations

import dataclasses
import datetime
import typing
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml

from ilvr_ds.errors import UserError, nearest

REQUIRED = "<required>"
Pool = Literal["all", "changed", "region"]


@dataclass(frozen=True)
class RunConfig:
    """Which run this is."""

    name: str = REQUIRED
    """Name of the run: its folder below `output_dir` and its name in MLflow."""
    seed: int = 0
    """Seeds the sample order, the target noise and what is drawn at random: adapters, weights without a source."""
    output_dir: str = "outputs"
    """Root folder of all runs; the MLflow store lies here too unless `tracking.uri` says otherwise."""
    stop_exit_code: int = 0
    """Exit code when a signal asked to stop and the checkpoint is saved; some schedulers requeue on a certain one."""
    rank_timeout_s: float = 60.0
    """A rank that gives no sign of life for so many seconds is lost: the job ends with its name."""
    stall_timeout_s: float = 1800.0
    """The job ends when no rank gets anywhere for so many seconds, saving and evaluating included."""


@dataclass(frozen=True)
class DataConfig:
    """What is read, and how it becomes tokens."""

    shards: str = REQUIRED
    """Folder or http(s) address that `ilvr-ds pack` wrote."""
    eval_shards: str | None = None
    """Held-out data of the same form; null: no evaluation during training."""
    features: str | None = None
    """Folder or http(s) address of the vision features of `shards` that `ilvr-ds encode` stored: they are read instead
    of pixels, and the vision tower is not loaded. null: images go through the tower in every step."""
    eval_features: str | None = None
    """The same for `eval_shards`; given where `features` and `eval_shards` are, and nowhere else."""
    lanes: int = 8
    """Independent streams of the sample order. World size must divide it, and it must divide the global batch."""
    shuffle_buffer: int = 4096
    """Each lane is shuffled this many samples at a time."""
    max_tokens: int = 4096
    """Longest sample in tokens; longer ones are refused, never truncated."""
    max_image_pixels: int = 1_003_520
    """Images above this many pixels are scaled down (1,280 merged patches of 28x28)."""
    packing: bool = True
    """Lay the samples of a micro-batch end to end in one row, so that nothing is padded. Stage 2 cannot where
    `train.latent_gradient` is full."""
    padding_side: Literal["right", "left"] = "right"
    """Without packing, the side on which short sequences are padded; right needs no attention mask and is faster."""
    blank_images: bool = False
    """Replace every image by a grey one of the same size: the control run that cannot look."""
    num_workers: int = 2
    """Loader processes of each rank."""
    max_bad_fraction: float = 0.01
    """Samples that cannot be read or decoded are replaced by stand-ins without a loss and listed in quarantine.jsonl.
    The run stops where they are more than this fraction of the last 1,000 samples (or of the whole data set, where it
    is smaller), or of the held-out samples; 0: at the first."""


@dataclass(frozen=True)
class ModelConfig:
    """The student, a Qwen2.5-VL. Its vision tower is always frozen."""

    path: str = REQUIRED
    """Folder or hub name."""
    random_init: bool = False
    """Draw random weights from the configuration at `path` instead of reading them (benchmarks)."""
    init_from: str | None = None
    """A checkpoint of another run, or the folder of a run (its newest checkpoint): the language model starts from
    these weights, and in stage 2 the teacher from the average there; `path` still says configuration, tokenizer and
    vision tower. Any number of ranks, any ZeRO stage."""
    latent_size: int = 8
    """Latent slots of a segment (K)."""
    attention: Literal["auto", "sdpa", "varlen", "flash_attention_2", "flash_attention_3", "flash_attention_4"] = "auto"
    """Attention of the language model; auto takes flash-attn where it is installed, else PyTorch's variable-length
    attention (varlen: packed rows, GPU, 16 bit), else PyTorch's SDPA."""
    kernels: Literal["auto", "liger", "stock"] = "auto"
    """Norms, gated activations and rotations on a GPU in 16 bit. auto: norms by PyTorch's fused kernel, the others by
    liger-kernel where it is installed; liger: the same, but the package must be there; stock: transformers' own."""
    activation_checkpointing: Literal["none", "full", "selective"] = "none"
    """What the backward computes again to save memory. full: each decoder layer, a third more work; selective (not with
    stage 2's `train.latent_gradient: full`): all but attention and matrix products, which saves a third (of
    stock layers half). true and false stand for full and none."""
    cuda_graphs: Literal["auto", "none"] = "auto"
    """Stage 2: the pass of a latent slot is recorded as CUDA graphs and replayed; auto: on a GPU, where each holds all
    weights (ZeRO-1 and 2)."""
    lora_rank: int = 0
    """Rank of LoRA adapters on the language model; 0 trains all of its weights. With adapters the embedding and the
    head stay frozen, the rows of the latent tokens among them."""
    lora_base: Literal["full", "nf4"] = "full"
    """The frozen linear layers under adapters: as they are, or in 4 bits (QLoRA; needs bitsandbytes)."""
    lora_alpha: float = 16.0
    """LoRA scale (alpha / rank multiplies the adapter's output)."""
    lora_targets: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    """Names of the linear layers that get adapters."""


@dataclass(frozen=True)
class TeacherConfig:
    """The momentum teacher: the student's language model, averaged over steps."""

    momentum: float = 0.999
    """teacher <- momentum * teacher + (1 - momentum) * student after each optimizer step."""
    offload: Literal["cpu", "none"] = "cpu"
    """Where the teacher's shards rest between its forwards: host memory or the device."""
    max_tokens: int = 65536
    """It reads the micro-batches of a step together as long as they cannot have more tokens than this, else in pieces:
    less memory, and its weights are fetched once for each piece."""


@dataclass(frozen=True)
class SelectionConfig:
    """How the teacher picks features of a helper image."""

    group_size: int = 256
    """At most this many candidates per helper image: runs of neighbouring patches are averaged (L)."""
    top_p: float = 0.9
    """Keep the smallest set of candidates whose probability reaches this mass, at most `model.latent_size`."""
    temperature: float = 1.0
    """Divides the cosines before the softmax; 1.0 is almost flat, so that latent_size patches are always kept."""
    pool: Pool = "all"
    """Candidates among which is chosen. all: those of the helper image, as published; changed: those that differ most
    from the picture before (the helper image before, for the first the input images of its grid; where grids differ,
    from the nearest patch of all earlier pictures); region: those in the box that the data give for the step."""
    pool_size: int = 0
    """With pool changed, at most so many candidates of a helper image are in the pool; 0: twice `model.latent_size`."""
    pool_min: int = 0
    """With pool changed: where fewer candidates stand out by their change, the next in order join them up to so many.
    0: none does, and slots may stay empty; `model.latent_size`: those that only heard of the change fill them."""
    by: Literal["query", "change"] = "query"
    """What ranks within the pool. query: cosine to the teacher's query, as published; change (with pool changed): how
    much the candidate differs from the picture before."""

    def pool_limit(self, latent_size: int) -> int:
        """At most so many candidates of a helper image have changed."""
        return self.pool_size or 2 * latent_size


@dataclass(frozen=True)
class LossConfig:
    """Weights and details of the losses."""

    ce_weight: float = 1.0
    """Weight of the cross-entropy over supervised tokens."""
    align_weight: float = 1.0
    """Weight of 1 - cosine(prediction, target)."""
    contrastive_weight: float = 0.1
    """Weight of the InfoNCE loss against candidates that were not selected."""
    contrastive_temperature: float = 0.1
    """Temperature of the InfoNCE loss."""
    contrastive_negatives: Literal["segment", "micro_batch", "world"] = "segment"
    """Negatives: of the same helper image; also of other samples in the micro-batch; also of the other ranks."""
    target_noise_std: float = 0.01
    """Standard deviation of the gaussian noise on the targets."""
    logits_chunk: int = 1024
    """Logits are held for so many supervised tokens at a time; the backward computes them again."""


@dataclass(frozen=True)
class OptimConfig:
    """Optimizer, schedule, clipping."""

    name: Literal["adamw", "cpu_adam", "adamw_8bit", "paged_adamw_8bit"] = "adamw"
    """adamw: torch, fused; cpu_adam: DeepSpeedCPUAdam (for optimizer offload); *_8bit: bitsandbytes."""
    lr: float = 1e-5
    """Peak learning rate."""
    beta1: float = 0.9
    """Adam's first decay."""
    beta2: float = 0.999
    """Adam's second decay."""
    eps: float = 1e-8
    """Adam's epsilon."""
    weight_decay: float = 0.01
    """Decoupled weight decay, on every trained weight."""
    warmup_steps: int = 0
    """Steps over which the rate rises linearly from 0."""
    schedule: Literal["constant", "linear", "cosine"] = "cosine"
    """Course of the rate after the warm-up."""
    min_lr_ratio: float = 0.0
    """Final rate as a fraction of `lr` (linear, cosine)."""
    max_grad_norm: float = 1.0
    """Gradients are clipped to this global norm; 0 switches clipping off."""


@dataclass(frozen=True)
class TrainConfig:
    """Length, batch and precision."""

    stage: Literal[1, 2] = 1
    """Training stage of the method. 1: teacher forcing with features that a momentum teacher selects; 2: latents are
    the student's own hidden states, held to the teacher's features by the same losses. Where `loss.align_weight` and
    `loss.contrastive_weight` are both 0, stage 2 has no teacher and reads no helper images."""
    latent_gradient: Literal["full", "detached"] | int = "detached"
    """Stage 2: how far gradients go back through the latents that the student feeds itself. detached: not at all, each
    latent learns from its own target and as context of what follows; N: along at most N latents one after the other, at
    the cost of a pass more for each; full: through the whole chain, as published, where they can explode."""
    epochs: int = 1
    """Passes over the data."""
    max_steps: int = 0
    """Stop after this many optimizer steps; 0: after `epochs`."""
    micro_batch_size: int = 1
    """Samples of one forward and backward on one rank (on average, where `micro_batch_tokens` is set)."""
    grad_accum_steps: int = 1
    """Micro-batches of one optimizer step on one rank."""
    micro_batch_tokens: int = 0
    """Fill micro-batches by tokens, at most so many in each: the step's samples (micro_batch_size x grad_accum_steps x
    ranks of them, as ever) are shared out so that all ranks have equally many micro-batches of nearly equal length.
    0: micro_batch_size samples each, whatever their lengths."""
    max_skipped_steps: int = 20
    """Stop after so many steps in a row whose gradients were not finite; such a step changes nothing."""
    precision: Literal["fp32", "bf16", "fp16"] = "bf16"
    """Precision of weights and activations; optimizer and teacher state are fp32 in any case."""
    gradient_precision: Literal["fp32", "model"] = "fp32"
    """Precision in which gradients are added up: over a step's micro-batches, over ranks, over chunks of logits and the
    latent slots that stage 2 replays. model: that of `precision`: less memory and communication, and in bf16 the sum of
    2 ranks and 8 micro-batches is off by half a percent."""

    @property
    def has_free_latents(self) -> bool:
        """Latents are the student's own, not given: stage 2."""
        return self.stage == 2

    @property
    def has_whole_chain(self) -> bool:
        """Gradients go through all of the student's own latents: these and the texts are one rollout."""
        return self.has_free_latents and self.latent_gradient == "full"


@dataclass(frozen=True)
class EvaluationConfig:
    """Loss and answer accuracy on `data.eval_shards` during training (teacher-forced)."""

    every_steps: int = 0
    """Evaluate after every so many optimizer steps and at the end; 0: at the end only."""
    max_samples: int = 512
    """At most this many held-out samples, rounded down to whole micro-batches on all ranks."""


@dataclass(frozen=True)
class CheckpointConfig:
    """Saving and going on."""

    every_steps: int = 500
    """Save after every so many optimizer steps and at the end; 0: at the end only."""
    keep_last: int = 2
    """Keep this many of the newest checkpoints; 0 keeps all."""
    keep_every: int = 0
    """Keep those after a multiple of so many steps for good; 0: none."""
    background: bool = True
    """Copy the state and write it beside the training, where the host has room for the copy."""
    resume: str = "auto"
    """auto: from the newest checkpoint of this run if there is one; must; never; or the path of a checkpoint."""


@dataclass(frozen=True)
class TrackingConfig:
    """Where metrics go besides the run's own metrics.jsonl."""

    uri: str | None = None
    """MLflow tracking address; null: MLFLOW_TRACKING_URI, else a SQLite file below run.output_dir."""
    experiment: str = "ilvr"
    """MLflow experiment."""
    parent: str | None = None
    """Name of an MLflow run above this one, made where there is none: runs of one run.output_dir, experiment and parent
    lie together, as those of a sweep do. null: none, or the run that model.init_from names."""
    every_steps: int = 10
    """Log metrics every so many optimizer steps."""
    pictures_every_steps: int = 500
    """Draw pictures every so many optimizer steps, and at the start and the end; 0: at start and end only. They lie in
    the run's folder `pictures` and in MLflow: the curves, where latents look and, with a teacher, what is selected."""
    picture_samples: int = 3
    """So many samples of `data.eval_shards` (without it `data.shards`) are drawn, always the same; 0: no pictures."""


@dataclass(frozen=True)
class DeepSpeedConfig:
    """Where the DeepSpeed settings are."""

    config: str = REQUIRED
    """ZeRO, offload and communication settings: the name of one of ds_configs (zero1, zero2, zero3, ...), or a JSON
    file; a path from the working directory or the recipe."""


@dataclass(frozen=True)
class Recipe:
    """All settings of a run; see the sections' classes for each key."""

    run: RunConfig = field(default_factory=RunConfig)
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    selection: SelectionConfig = field(default_factory=SelectionConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    deepspeed: DeepSpeedConfig = field(default_factory=DeepSpeedConfig)

    @property
    def packs(self) -> bool:
        """Samples lie end to end in one row: asked for, and no rollout with gradients, which has rows of its own."""
        return self.data.packing and not self.train.has_whole_chain

    @property
    def has_teacher(self) -> bool:
        """A teacher selects targets: in stage 1, and in stage 2 where a loss asks for them."""
        return not self.train.has_free_latents or self.loss.align_weight > 0 or self.loss.contrastive_weight > 0

    @property
    def run_dir(self) -> Path:
        """Folder of this run."""
        return Path(self.run.output_dir).absolute() / self.run.name

    def to_dict(self) -> dict[str, dict[str, Any]]:
        """Plain nested dictionary: sections, keys, values (tuples as lists)."""
        plain = dataclasses.asdict(self)
        return {s: {k: list(v) if isinstance(v, tuple) else v for k, v in keys.items()} for s, keys in plain.items()}

    def flat(self) -> dict[str, Any]:
        """Dotted keys and values, as in `--set`."""
        return {f"{section}.{key}": value for section, keys in self.to_dict().items() for key, value in keys.items()}


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
    "optim.beta1": (0.0, 1.0),
    "optim.beta2": (0.0, 1.0),
    "optim.eps": (0.0, 1.0),
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
    "train.max_skipped_steps": (1, 2**31),
    "evaluation.every_steps": (0, 2**31),
    "evaluation.max_samples": (1, 2**31),
    "checkpoint.every_steps": (0, 2**31),
    "checkpoint.keep_last": (0, 2**31),
    "checkpoint.keep_every": (0, 2**31),
    "tracking.every_steps": (1, 2**31),
    "tracking.pictures_every_steps": (0, 2**31),
    "tracking.picture_samples": (0, 16),
}


@dataclass(frozen=True)
class _Value:
    """A value as it was written, and where."""

    value: Any
    where: str


def load_recipe(path: str | Path, overrides: Iterable[str] = ()) -> Recipe:
    """Read a recipe file and apply `section.key=value` overrides.

    Raises UserError with file and line (or the override) for anything that is not a valid recipe.
    """
    path = Path(path)
    values = _read_yaml(path)
    for override in overrides:
        key, separator, text = override.partition("=")
        if not separator:
            raise UserError(f"--set {override}: expected section.key=value")
        try:
            value = yaml.safe_load(text)
        except (yaml.YAMLError, ValueError) as error:
            raise UserError(f"--set {override}: the value is not valid YAML") from error
        values[key.strip()] = _Value(value, f"--set {override}")
    return build_recipe(values, missing_at=str(path))


def recipe_from_dict(sections: Mapping[str, Mapping[str, Any]]) -> Recipe:
    """The recipe of nested plain values, as `Recipe.to_dict` gives them; raises UserError."""
    values = {f"{s}.{k}": _Value(v, f"{s}.{k}") for s, keys in sections.items() for k, v in keys.items()}
    return build_recipe(values, missing_at="recipe")


def build_recipe(values: Mapping[str, _Value], missing_at: str) -> Recipe:
    """Check dotted keys, types, ranges and required keys, and build the recipe."""
    sections = {f.name: typing.get_type_hints(Recipe)[f.name] for f in dataclasses.fields(Recipe)}
    known = {f"{s}.{f.name}": t for s, cls in sections.items() for f, t in _fields(cls)}
    parsed: dict[str, dict[str, Any]] = {section: {} for section in sections}
    for key, item in values.items():
        if key not in known:
            raise UserError(f"{item.where}: unknown key '{key}'{_nearest_key(key, known)}")
        section, _, name = key.partition(".")
        parsed[section][name] = _convert(item, known[key], key)
    recipe = Recipe(**{section: cls(**parsed[section]) for section, cls in sections.items()})
    missing = [key for key, value in recipe.flat().items() if value == REQUIRED]
    if missing:
        raise UserError(f"{missing_at}: missing {', '.join(missing)}")
    _check_combinations(recipe, missing_at)
    return recipe


def _check_combinations(recipe: Recipe, where: str) -> None:
    if "/" in recipe.run.name or recipe.run.name in ("", ".", ".."):
        raise UserError(f"{where}: run.name '{recipe.run.name}' is not a plain folder name")
    data = recipe.data
    if (data.features is None or data.eval_shards is None) and data.eval_features is not None:
        raise UserError(f"{where}: data.eval_features needs data.features and data.eval_shards beside it; remove it")
    if data.features is not None and data.eval_shards is not None and data.eval_features is None:
        raise UserError(
            f"{where}: data.features is set, so there is no vision tower to evaluate with: set data.eval_features too "
            f"(ilvr-ds encode --shards {data.eval_shards} writes them), or data.eval_shards to null"
        )
    loss = recipe.loss
    if loss.ce_weight == loss.align_weight == loss.contrastive_weight == 0:
        raise UserError(f"{where}: loss.ce_weight, loss.align_weight and loss.contrastive_weight are all 0")
    selection, latents = recipe.selection, recipe.model.latent_size
    if selection.by == "change" and selection.pool != "changed":
        raise UserError(f"{where}: selection.by is change, but selection.pool is {selection.pool}; set it to changed")
    if 0 < selection.pool_size < latents:
        raise UserError(
            f"{where}: selection.pool_size is {selection.pool_size}, less than model.latent_size {latents}; 0 takes "
            f"{2 * latents}"
        )
    if selection.pool_min > (limit := selection.pool_limit(latents)):
        raise UserError(
            f"{where}: selection.pool_min is {selection.pool_min}, but a pool holds at most {limit}; lower it"
        )
    if recipe.train.micro_batch_tokens and not recipe.packs:
        why = "data.packing is false"
        if recipe.train.has_whole_chain:
            why = "stage 2 with train.latent_gradient full has rows of its own"
        raise UserError(f"{where}: train.micro_batch_tokens fills packed rows, but {why}; set it to 0")
    if recipe.model.attention == "varlen" and not recipe.packs and not recipe.train.has_whole_chain:
        raise UserError(f"{where}: model.attention is varlen, but data.packing is false; valid: auto, sdpa")
    for name in recipe.model.lora_targets:
        if name not in ModelConfig.lora_targets:
            valid = f"{nearest(name, ModelConfig.lora_targets)}; valid: {', '.join(ModelConfig.lora_targets)}"
            raise UserError(f"{where}: model.lora_targets: no linear layer '{name}'{valid}")
    if recipe.model.lora_base != "full" and not recipe.model.lora_rank:
        raise UserError(
            f"{where}: model.lora_base is {recipe.model.lora_base}, but all weights are trained; set model.lora_rank"
        )
    if recipe.train.has_whole_chain and recipe.model.activation_checkpointing == "selective":
        raise UserError(
            f"{where}: model.activation_checkpointing is selective, which stage 2 with train.latent_gradient full does "
            "not have; valid: none, full"
        )
    if recipe.train.has_whole_chain and recipe.model.attention not in ("auto", "sdpa"):
        raise UserError(
            f"{where}: model.attention is {recipe.model.attention}, but stage 2 with train.latent_gradient full "
            "computes on PyTorch's SDPA; valid: auto, sdpa"
        )


def _nearest_key(key: str, known: Iterable[str]) -> str:
    """A hint for an unknown key; the last word of a known one may have been meant ("lr")."""
    homes = sorted(name for name in known if name.partition(".")[2] == key)
    return f"; did you mean {' or '.join(map(repr, homes))}?" if homes else nearest(key, known)


_Section = TypeVar("_Section")


def _fields(cls: type[_Section]) -> list[tuple[dataclasses.Field[Any], Any]]:
    hints = typing.get_type_hints(cls)
    return [(f, hints[f.name]) for f in dataclasses.fields(cls)]  # type: ignore[arg-type]


def _convert(item: _Value, kind: Any, key: str) -> Any:
    """The value as `kind`; ints stand for floats, lists for tuples; nothing else is coerced."""
    value = item.value
    if isinstance(value, bool):
        value = _BOOL_STANDS_FOR.get((key, value), value)
    options = typing.get_args(kind)
    words = next((option for option in (kind, *options) if typing.get_origin(option) is Literal), None)
    is_count = int in options and type(value) is int
    if words is not None and not is_count:
        known = typing.get_args(words)
        if value not in known or isinstance(value, bool):
            names = [str(word) for word in known] + ["an integer"] * (int in options)
            hint = nearest(value, names) if isinstance(value, str) else ""
            hint = hint if "did you mean" in hint else ""
            raise UserError(f"{item.where}: {key} is {value!r}; valid: {', '.join(names)}{hint}")
        return value
    if typing.get_origin(kind) is tuple:
        if not isinstance(value, list) or not all(isinstance(v, str) for v in value):
            raise UserError(f"{item.where}: {key} is {value!r}; expected a list of strings")
        return tuple(value)
    if is_count:
        kind = int
    if type(None) in options:
        if value is None:
            return None
        kind = next(option for option in options if option is not type(None))
    if kind is float and isinstance(value, str):
        # YAML 1.1 reads 1e-5 (without a dot) as a string; users mean a number.
        try:
            value = float(value)
        except ValueError:
            raise UserError(f"{item.where}: {key} is '{value}'; expected a number") from None
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if kind is str and type(value) is datetime.date:
        value = value.isoformat()  # as it was written: YAML takes no other form of a date
    if type(value) is not kind:
        quoted = f"; to have it as text, quote it: \"'{value}'\"" if kind is str and value is not None else ""
        raise UserError(f"{item.where}: {key} is {value!r}; expected {_KIND_NAMES[kind]}{quoted}")
    low, high = LIMITS.get(key, (float("-inf"), float("inf")))
    if kind in (int, float) and not low <= value <= high:
        raise UserError(f"{item.where}: {key} is {value}; expected a value from {low:g} to {high:g}")
    return value


_BOOL_STANDS_FOR = {
    ("model.activation_checkpointing", False): "none",
    ("model.activation_checkpointing", True): "full",
}
"""What was a yes or no before: recipes and checkpoints that say so stay valid."""

_KIND_NAMES = {int: "an integer", float: "a number", str: "a string", bool: "true or false"}


def _read_yaml(path: Path) -> dict[str, _Value]:
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"{path}: cannot read the recipe ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: cannot read the recipe (not UTF-8 text)") from error
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        at = f":{mark.line + 1}" if mark else ""
        raise UserError(f"{path}{at}: not valid YAML ({_reason(error)})") from error
    values: dict[str, _Value] = {}
    sections = [f.name for f in dataclasses.fields(Recipe)]
    for section, section_node, line in _items(root, path, "the recipe"):
        if section not in sections:
            raise UserError(f"{path}:{line}: unknown section '{section}'{nearest(section, sections)}")
        for key, node, line_of_key in _items(section_node, path, f"section '{section}'"):
            dotted = f"{section}.{key}"
            if dotted in values:
                raise UserError(f"{path}:{line_of_key}: {dotted} stands here twice (first: {values[dotted].where})")
            where = f"{path}:{line_of_key}"
            values[dotted] = _Value(_construct(node, where), where)
    return values


def _items(node: Any, path: Path, what: str) -> list[tuple[str, Any, int]]:
    if not isinstance(node, yaml.MappingNode):
        line = node.start_mark.line + 1 if node is not None else 1
        raise UserError(f"{path}:{line}: {what} must be a mapping of keys to values")
    return [(str(key.value), value, key.start_mark.line + 1) for key, value in node.value]


def _construct(node: Any, where: str) -> Any:
    try:
        return yaml.SafeLoader("").construct_object(node, deep=True)
    except (yaml.YAMLError, ValueError) as error:  # an unknown tag; a date that does not exist
        raise UserError(f"{where}: not valid YAML ({_reason(error)})") from error


def _reason(error: Exception) -> str:
    return getattr(error, "problem", None) or str(error).splitlines()[0]
