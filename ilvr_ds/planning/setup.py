"""Everything that decides a run's memory and time: sizes, ranks and the recipe's choices, as plain numbers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from ilvr_ds.config import Recipe, TeacherConfig
from ilvr_ds.model.sizes import Geometry

BYTES = {"bf16": 2, "fp16": 2, "fp32": 4}


@dataclass(frozen=True)
class SampleSize:
    """A typical sample. The defaults are one input image of 672x672, three helper images of 448x448, four short texts
    and a question of 150 tokens."""

    tokens: int = 1030
    labels: int = 280
    patches: int = 5376
    """Patches of all its images, before merging"""


@dataclass(frozen=True)
class Zero:
    """The DeepSpeed settings that matter here, with DeepSpeed's defaults. Sizes are in elements."""

    stage: int = 3
    offloads_optimizer: bool = False
    offloads_weights: bool = False
    max_live: int = 10**9
    prefetch_bucket: int = 5 * 10**7
    reduce_bucket: int = 5 * 10**8
    gather_bucket: int = 5 * 10**8
    persistence_threshold: int = 10**5
    sub_group: int = 10**9
    overlaps: bool = False

    @staticmethod
    def of(settings: Mapping[str, Any]) -> Zero:
        """From the contents of a DeepSpeed JSON."""
        zero = settings.get("zero_optimization", {})
        stage = int(zero.get("stage", 0))

        def is_offloaded(name: str) -> bool:
            return bool((zero.get(name) or {}).get("device", "none") != "none")

        def size(name: str, default: int) -> int:
            value = zero.get(name, default)
            return default if value == "auto" else int(value)

        return Zero(
            stage=stage,
            offloads_optimizer=is_offloaded("offload_optimizer"),
            offloads_weights=is_offloaded("offload_param"),
            max_live=size("stage3_max_live_parameters", Zero.max_live),
            prefetch_bucket=size("stage3_prefetch_bucket_size", Zero.prefetch_bucket),
            reduce_bucket=size("reduce_bucket_size", Zero.reduce_bucket),
            gather_bucket=size("allgather_bucket_size", Zero.gather_bucket),
            persistence_threshold=size("stage3_param_persistence_threshold", Zero.persistence_threshold),
            sub_group=size("sub_group_size", Zero.sub_group),
            overlaps=bool(zero.get("overlap_comm", stage == 3)),
        )


@dataclass(frozen=True)
class Setup:
    """A run, as far as memory and time depend on it."""

    geometry: Geometry
    world: int
    """Ranks, one per GPU"""
    zero: Zero
    sample: SampleSize
    micro_batch_size: int
    grad_accum_steps: int
    itemsize: int
    """Bytes of a weight or an activation"""
    has_fused_layers: bool
    """Fused norms, activations and rotations: model/layers/fused.py, with liger-kernel installed"""
    average_itemsize: int
    """Bytes of a teacher's average beside the weight that its network reads: distill/ema.py"""
    checkpointing: str
    logits_chunk: int
    """Supervised tokens whose logits are held at a time"""
    optimizer: str
    lora_rank: int
    lora_targets: tuple[str, ...]
    has_teacher: bool
    teacher_offload: str
    has_tower: bool
    num_workers: int
    sums_in_fp32: bool = False
    """Gradients are accumulated in float32: train.gradient_precision"""
    may_do_without_teacher: bool = False
    """Its query serves only pictures in which nothing changed: selection.unchanged"""
    has_4_bit_base: bool = False
    """Frozen linear layers in 4 bits, whole on every rank: model/layers/four_bit.py"""
    may_record: bool = True
    """CUDA graphs are allowed"""
    latent_gradient: Literal["full", "detached"] | int | None = None
    """Of stage 2; None in stage 1"""
    micro_batch_tokens: int = 0
    """Micro-batches are filled up to this many tokens; 0: micro_batch_size samples each"""
    step_samples: int = 0
    """Samples of an optimizer step on one rank; 0: all micro-batches are full"""
    teacher_tokens: int = TeacherConfig.max_tokens
    """Most tokens that the teacher reads at once, unless one micro-batch has more"""

    @staticmethod
    def of(recipe: Recipe, zero: Zero, geometry: Geometry, world: int, sample: SampleSize) -> Setup:
        """A recipe on `world` ranks."""
        model, train = recipe.model, recipe.train
        setup = Setup(
            geometry=geometry,
            world=world,
            zero=zero,
            sample=sample,
            micro_batch_size=train.micro_batch_size,
            grad_accum_steps=train.grad_accum_steps,
            itemsize=BYTES[train.precision],
            has_fused_layers=model.kernels != "stock" and BYTES[train.precision] == 2,
            average_itemsize=2 if train.precision == "bf16" else 4,
            checkpointing=model.activation_checkpointing,
            logits_chunk=recipe.loss.logits_chunk,
            optimizer=recipe.optim.name,
            lora_rank=model.lora_rank,
            lora_targets=model.lora_targets,
            has_teacher=recipe.has_teacher,
            teacher_offload=recipe.teacher.offload,
            may_do_without_teacher=recipe.has_teacher and recipe.selection.by == "change",
            has_tower=not recipe.data.has_features,
            num_workers=recipe.data.num_workers,
            sums_in_fp32=train.gradient_precision == "fp32",
            has_4_bit_base=model.lora_base != "full",
            may_record=model.cuda_graphs == "auto",
            teacher_tokens=recipe.teacher.max_tokens,
            latent_gradient=train.latent_gradient if train.has_free_latents else None,
        )
        return setup.filled(train.micro_batch_tokens) if train.micro_batch_tokens else setup

    def filled(self, tokens: int) -> Setup:
        """The same step in the fewest micro-batches of up to `tokens` each."""
        samples = self.window_samples
        accum = min(samples, -(-samples * self.sample.tokens // tokens))
        return replace(
            self,
            micro_batch_size=-(-samples // accum),
            grad_accum_steps=accum,
            micro_batch_tokens=tokens,
            step_samples=samples,
        )

    @property
    def trained(self) -> int:
        """Trained weights of the student."""
        text = self.geometry.text
        return text.adapters(self.lora_rank, self.lora_targets) if self.lora_rank else text.total

    @property
    def frozen(self) -> int:
        """Frozen weights of the student's language model and head."""
        return self.geometry.text.total if self.lora_rank else 0

    @property
    def packed(self) -> int:
        """Frozen weights in 4 bits."""
        return self.geometry.text.layers * self.geometry.text.layer_matrices if self.has_4_bit_base else 0

    @property
    def records_latents(self) -> bool:
        """Whether stage 2 uses CUDA graphs: model/latent_pass.py"""
        return self.may_record and self.latent_gradient is not None and self.zero.stage < 3

    @property
    def has_whole_chain(self) -> bool:
        """Whether stage 2 has gradients through the whole rollout"""
        return self.latent_gradient == "full"

    @property
    def passes(self) -> int:
        """Passes over all tokens that keep activations until the backward"""
        return 1 + self.latent_gradient if isinstance(self.latent_gradient, int) else 1

    @property
    def held(self) -> int:
        """Weights in the student's engine."""
        return self.trained + self.frozen - self.packed

    @property
    def gradient_itemsize(self) -> int:
        """Bytes of a gradient between backward and optimizer."""
        return 4 if self.sums_in_fp32 else self.itemsize

    @property
    def bucket_itemsize(self) -> int:
        """Bytes of a gradient before it is summed over ranks: ZeRO-2 converts it when it is sent."""
        return self.itemsize if self.zero.stage == 2 else self.gradient_itemsize

    @property
    def micro_tokens(self) -> int:
        """Tokens of a micro-batch."""
        return self.micro_batch_size * self.sample.tokens

    @property
    def window_samples(self) -> int:
        """Samples of an optimizer step on one rank."""
        return self.step_samples or self.micro_batch_size * self.grad_accum_steps

    @property
    def micro_batches_read_together(self) -> int:
        """Micro-batches that the teacher reads at once: as many as are sure to stay within teacher.max_tokens."""
        together = self.teacher_tokens // (self.micro_batch_tokens or self.micro_tokens)
        return min(self.grad_accum_steps, max(1, together))

    @property
    def teacher_pieces(self) -> int:
        """Pieces in which the teacher reads a window."""
        return -(-self.grad_accum_steps // self.micro_batches_read_together)

    def shard(self, count: int) -> float:
        """A rank's part of `count` weights."""
        return count / self.world
