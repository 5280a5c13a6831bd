"""The sections of a recipe: every key with its type, its default and what it does."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ilvr_ds.config.data_sections import REQUIRED

Pool = Literal["all", "changed", "region"]
Compare = Literal["place", "nearest"]


@dataclass(frozen=True)
class RunConfig:
    """Which run this is."""

    name: str = REQUIRED
    """Names the run's folder below `output_dir`, and the run in MLflow."""
    seed: int = 0
    """Seeds the sample order, the target noise, and weights that are drawn at random (adapters, `random_init`)."""
    output_dir: str = "outputs"
    """Root folder of all runs. The MLflow store lies here too, unless `tracking.uri` says otherwise."""
    stop_exit_code: int = 0
    """Exit code after a signal asked to stop and the checkpoint is saved; some schedulers requeue on a certain code."""
    rank_timeout_s: float = 60.0
    """A rank that shows no sign of life for this long is lost: the job names it and ends."""
    stall_timeout_s: float = 1800.0
    """The job ends when no rank makes progress for this long, saving and evaluating included."""


@dataclass(frozen=True)
class ModelConfig:
    """The student, a Qwen2.5-VL or a dense Qwen3-VL. Its vision tower is always frozen."""

    path: str = REQUIRED
    """Folder, or name on the Hugging Face hub."""
    random_init: bool = False
    """Draw random weights for the configuration at `path` instead of reading them (for benchmarks)."""
    init_from: str | None = None
    """A checkpoint of another run, or a run's folder (its newest checkpoint). The language model starts from these
    weights, and in stage 2 the teacher starts from their average, if that run had one. Configuration, tokenizer and
    vision tower still come from `path`. Number of ranks and ZeRO stage may differ."""
    latent_size: int = 8
    """Latent slots per segment (K)."""
    attention: Literal["auto", "sdpa", "varlen", "flash_attention_2", "flash_attention_3", "flash_attention_4"] = "auto"
    """Attention of the language model. auto takes flash-attn if it is installed, else PyTorch's variable-length
    attention (varlen: packed rows, GPU, 16 bit), else PyTorch's SDPA."""
    kernels: Literal["auto", "liger", "stock"] = "auto"
    """Norms, gated activations and rotary embeddings on a GPU in 16 bit. auto: PyTorch's fused kernel for norms,
    liger-kernel for the others if it is installed; liger: the same, but the package is required; stock:
    transformers' own."""
    activation_checkpointing: Literal["none", "full", "selective"] = "none"
    """What the backward pass recomputes to save memory. full: each decoder layer, for a third more work; selective (not
    in stage 2 with `train.latent_gradient: full`): all but attention and matrix products, which saves a third (half
    with stock layers). true and false stand for full and none."""
    cuda_graphs: Literal["auto", "none"] = "auto"
    """Stage 2: record the pass of a latent slot as CUDA graphs and replay them. auto: on GPUs that each hold all
    weights (ZeRO-1 and 2)."""
    lora_rank: int = 0
    """Rank of LoRA adapters on the language model; 0 trains all of its weights. With adapters the embedding and the
    head stay frozen, including the rows of the latent tokens."""
    lora_base: Literal["full", "nf4"] = "full"
    """The frozen linear layers under adapters. full: in the model's precision; nf4: in 4 bits (QLoRA, bitsandbytes)."""
    lora_alpha: float = 16.0
    """LoRA scale: alpha / rank multiplies the adapter's output."""
    lora_targets: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    """Names of the linear layers that get adapters."""


@dataclass(frozen=True)
class TeacherConfig:
    """The momentum teacher, an exponential moving average (EMA) of the student; see `selection.unchanged`."""

    momentum: float = 0.999
    """EMA decay: teacher <- momentum * teacher + (1 - momentum) * student after each optimizer step."""
    offload: Literal["cpu", "none"] = "cpu"
    """Where the teacher's shards stay between its forward passes: host memory, or the device."""
    max_tokens: int = 65536
    """Limits the tokens of one forward pass. A step's micro-batches that may exceed it are read in several passes: that
    takes less memory, but the weights are fetched once per pass."""


@dataclass(frozen=True)
class SelectionConfig:
    """How features of a helper image are selected as targets."""

    group_size: int = 256
    """At most this many candidates per helper image (L): neighbouring patches are averaged to get there."""
    top_p: float = 0.9
    """Keep the smallest set of candidates with this probability mass, at most `model.latent_size` of them."""
    temperature: float = 1.0
    """Divides the cosines before the softmax. At 1.0 it is almost flat: latent_size candidates are always kept."""
    pool: Pool = "all"
    """Which candidates may be selected. all: every one of the helper image, as published; changed: those that differ
    most from what was shown before; region: those in the box that the data give for a step."""
    compare: Compare = "place"
    """With pool changed: what a candidate is compared with. place: its place in the picture before (the previous helper
    image; for the first, the input images with the same grid; if grids differ, as with nearest); nearest: the most
    similar patch of all earlier pictures, so that what is shown again, or elsewhere, has not changed."""
    pool_size: int = 0
    """With pool changed: at most this many candidates per helper image; 0: twice `model.latent_size`."""
    pool_min: int = 0
    """With pool changed: if fewer candidates than this stand out by their change, the next most changed fill up the
    pool. 0: none do, and slots may stay empty. `model.latent_size`: no slot stays empty, but patches that changed
    only through attention become targets."""
    by: Literal["query", "change"] = "query"
    """What ranks the pool. query: cosine to the teacher's query, as published; change (needs pool changed): how much
    the candidate differs from the picture before."""
    unchanged: Literal["query", "none"] = "query"
    """With pool changed: what becomes of a helper image in which nothing differs from the picture before. query: its
    targets are chosen among all patches by the query; none (needs by change): its segment has no target. The query is
    then read nowhere, and there is no teacher: nothing of it is computed, held or saved."""
    order: Literal["score", "place"] = "score"
    """Which of the selected comes first. score: the highest, as published; place: the first patch of the picture.
    Patches that score about the same come in an arbitrary order, which the student cannot predict: with score it then
    predicts a mean of them."""

    @property
    def needs_query(self) -> bool:
        """Whether the query, which a teacher reads, decides anything."""
        return self.unchanged == "query"

    def pool_limit(self, latent_size: int) -> int:
        """The largest number of candidates in a pool of changed ones."""
        return self.pool_size or 2 * latent_size


@dataclass(frozen=True)
class LossConfig:
    """Weights and details of the losses."""

    ce_weight: float = 1.0
    """Weight of the cross-entropy over supervised tokens."""
    align_weight: float = 1.0
    """Weight of 1 - cosine(prediction, target)."""
    contrastive_weight: float = 0.1
    """Weight of the InfoNCE loss, whose negatives are candidates that were not selected."""
    contrastive_temperature: float = 0.1
    """Temperature of the InfoNCE loss."""
    contrastive_negatives: Literal["segment", "micro_batch", "world"] = "segment"
    """Negatives: from the same helper image; also from other samples of the micro-batch; also from other ranks."""
    target_noise_std: float = 0.01
    """Standard deviation of the Gaussian noise on the targets."""
    logits_chunk: int = 1024
    """Logits exist for this many supervised tokens at a time; the backward pass recomputes them."""


@dataclass(frozen=True)
class OptimConfig:
    """Optimizer, learning-rate schedule, gradient clipping."""

    name: Literal["adamw", "cpu_adam", "adamw_8bit", "paged_adamw_8bit"] = "adamw"
    """adamw: torch, fused; cpu_adam: DeepSpeedCPUAdam (for optimizer offload); *_8bit: bitsandbytes."""
    lr: float = 1e-5
    """Peak learning rate."""
    beta1: float = 0.9
    """Adam's decay of the first moment."""
    beta2: float = 0.999
    """Adam's decay of the second moment."""
    eps: float = 1e-8
    """Adam's epsilon."""
    weight_decay: float = 0.01
    """Decoupled weight decay, applied to every trained weight."""
    warmup_steps: int = 0
    """The learning rate rises linearly from 0 over this many steps."""
    schedule: Literal["constant", "linear", "cosine"] = "cosine"
    """Learning-rate schedule after the warm-up."""
    min_lr_ratio: float = 0.0
    """Final learning rate as a fraction of `lr` (linear, cosine)."""
    max_grad_norm: float = 1.0
    """Gradient clipping: the largest global norm; 0: no clipping."""


@dataclass(frozen=True)
class TrainConfig:
    """Length, batch and precision."""

    stage: Literal[1, 2] = 1
    """Stage of the method. 1: teacher forcing with selected features of the helper images; 2: latents are the
    student's own hidden states, held to those features by the same losses. With `loss.align_weight` and
    `loss.contrastive_weight` both 0, stage 2 has no targets: no teacher, and no helper images are read."""
    latent_gradient: Literal["full", "detached"] | int = "detached"
    """Stage 2: how far gradients flow back through the latents that the student feeds itself. detached: not at all,
    each latent learns from its own target and as context of what follows; N: through at most N latents in a row, for N
    more passes; full: through the whole chain, as published, where they can explode."""
    epochs: int = 1
    """Passes over the data; of a mixture, epochs as its entries make them (docs/data.md)."""
    max_steps: int = 0
    """Stop after this many optimizer steps; 0: after `epochs`."""
    micro_batch_size: int = 1
    """Samples per forward and backward pass of one rank (on average, if `micro_batch_tokens` is set)."""
    grad_accum_steps: int = 1
    """Micro-batches per optimizer step of one rank."""
    micro_batch_tokens: int = 0
    """Fill micro-batches by tokens, at most this many in each. A step has the same samples as without it
    (micro_batch_size x grad_accum_steps x ranks); they are distributed so that all ranks have equally many
    micro-batches of nearly equal length. In stage 2 the samples of one are of like length, and count as many tokens as
    the longest. 0: micro_batch_size samples each, whatever their lengths."""
    patience: int = 0
    """End the run after this many evaluations in a row that were not better than the best one by
    `checkpoint.keep_best`; 0: never before the last step."""
    max_skipped_steps: int = 20
    """Stop after this many steps in a row without finite gradients; such a step changes nothing."""
    precision: Literal["fp32", "bf16", "fp16"] = "bf16"
    """Precision of weights and activations; optimizer state and teacher average are always fp32."""
    gradient_precision: Literal["fp32", "model"] = "fp32"
    """Precision of gradient sums: over a step's micro-batches, ranks, chunks of logits, and latent slots that stage 2
    replays. model: the same as `precision`, which takes less memory and communication; in bf16 the sum of 2 ranks and
    8 micro-batches is then off by half a percent."""

    @property
    def has_free_latents(self) -> bool:
        """Whether latents are the student's own: stage 2."""
        return self.stage == 2

    @property
    def has_whole_chain(self) -> bool:
        """Whether gradients flow through all of the student's own latents, in one rollout with the text."""
        return self.has_free_latents and self.latent_gradient == "full"


@dataclass(frozen=True)
class EvaluationConfig:
    """Loss and answer accuracy on `data.eval_shards` during training, teacher-forced, and free answers."""

    every_steps: int = 0
    """Optimizer steps between evaluations, with one more at the end; 0: at the end only."""
    max_samples: int = 512
    """At most this many held-out samples, of a mixture of each set, evenly from all that are stored; rounded down to
    whole micro-batches of all ranks."""
    generate_samples: int = 0
    """In each evaluation also answer this many of them freely (eval/generated_accuracy); 0: none. Slow under ZeRO-3."""


@dataclass(frozen=True)
class CheckpointConfig:
    """Saving and resuming."""

    every_steps: int = 500
    """Optimizer steps between checkpoints, with one more at the end; 0: at the end only."""
    keep_last: int = 2
    """Keep this many of the newest checkpoints; 0: all."""
    keep_every: int = 0
    """Also keep every checkpoint whose step is a multiple of this, for good; 0: none."""
    keep_best: Literal["none", "eval/ce", "eval/answer_accuracy"] = "none"
    """Also save and keep the checkpoint with the best evaluation so far: the least eval/ce, or the largest
    eval/answer_accuracy. `ilvr-ds export RUN --best` takes it."""
    background: bool = True
    """Copy the state and write it in the background, if the host has memory for the copy."""
    resume: str = "auto"
    """auto: from the newest checkpoint of this run, if there is one; must: the same, and it is an error if there is
    none; never; or the path of a checkpoint."""


@dataclass(frozen=True)
class TrackingConfig:
    """Where metrics go in addition to the run's own metrics.jsonl."""

    uri: str | None = None
    """MLflow tracking address; null: MLFLOW_TRACKING_URI, else a SQLite file below `run.output_dir`."""
    experiment: str = "ilvr"
    """MLflow experiment."""
    parent: str | None = None
    """Name of the parent run in MLflow, created if there is none. It groups the runs of a sweep: those with the same
    `run.output_dir`, experiment and parent. null: none, or the run that `model.init_from` names."""
    every_steps: int = 10
    """Optimizer steps between two logged points."""
    pictures_every_steps: int = 500
    """Optimizer steps between pictures, with more at the start and the end; 0: only those. Drawn are the curves, where
    latents look and what is selected, if anything is; they go to the run's folder `pictures` and to MLflow."""
    picture_samples: int = 3
    """Draw this many samples of `data.eval_shards` (else of `data.shards`), always the same; 0: no pictures."""


@dataclass(frozen=True)
class DeepSpeedConfig:
    """Where the DeepSpeed settings come from."""

    config: str = REQUIRED
    """ZeRO, offload and communication settings: the name of a file in ds_configs (zero1, zero2, zero3, ...), or the
    path of a JSON file, relative to the working directory or the recipe."""
