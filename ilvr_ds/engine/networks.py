"""The networks of a run: the student's engine, the teacher's engine, and the shards of their weights.

There are three: the student (ZeRO engine with optimizer), the frozen vision tower (one plain copy per
device, outside any engine; none where its features are stored) and, where targets need it, the teacher's language
model (an engine without an optimizer, always ZeRO-3, with its shards in host memory unless `teacher.offload` is none).
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import cached_property
from pathlib import Path
from typing import Any

import deepspeed
import torch
from deepspeed.ops.op_builder.cpu import ShareMemCommBuilder
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.runtime.zero import stage3
from deepspeed.runtime.zero.config import ZERO_OPTIMIZATION
from torch import Tensor, nn
from transformers.integrations import HfDeepSpeedConfig

from ilvr_ds import dist
from ilvr_ds.checkpoint.compatible import LAYERS, TOWER
from ilvr_ds.checkpoint.layout import Layout
from ilvr_ds.config import Recipe
from ilvr_ds.distill.query import ContextEncoder
from ilvr_ds.distill.stage1 import StageOne
from ilvr_ds.distill.stage2 import StageTwo
from ilvr_ds.engine.even_slices import EvenSlices
from ilvr_ds.engine.initial import load_weights
from ilvr_ds.engine.kept_gradients import keep_until_reduced
from ilvr_ds.engine.optimizer import build_optimizer
from ilvr_ds.engine.settings import deepspeed_settings, layout_of, teacher_settings
from ilvr_ds.engine.written_weights import gather_when_written
from ilvr_ds.model.fingerprint import fingerprint
from ilvr_ds.model.layers.adapters import add_adapters
from ilvr_ds.model.layers.attention import attention_backend, use_packed_attention, use_varlen_attention
from ilvr_ds.model.layers.four_bit import pack_layers, weight_of
from ilvr_ds.model.layers.fused import use_fused_kernels
from ilvr_ds.model.student import DTYPES, build_text_model, detach_tower, load_student, prepare_student
from ilvr_ds.model.vision import StoredFeatures, VisionTower


def init_process_group(timeout_s: float = 1800.0) -> None:
    """Join the job; a process without a launcher becomes a job of one. All collectives fail after `timeout_s`."""
    place = dist.enter()
    timeout = timedelta(seconds=timeout_s)
    dist.set_default_timeout(timeout)
    if place.world_size == 1:
        dist.join_alone(timeout)
    # its shared-memory collectives, which take a minute to compile, serve only tensor-parallel inference
    deepspeed.ops.__compatible_ops__[ShareMemCommBuilder.NAME] = False
    deepspeed.init_distributed(dist_backend=dist.backend(), timeout=timeout, verbose=False)


@dataclass
class Networks:
    """Student, teacher and vision, ready to compute."""

    student: Any
    """DeepSpeed engine around a StageOne or a StageTwo."""
    teacher: Any
    """DeepSpeed engine around a ContextEncoder; None where there are no targets, or what changed alone decides."""
    vision: VisionTower | StoredFeatures
    layout: Layout
    """The ZeRO stage, and the settings that decide where the elements of weights lie."""
    trained: list[str]
    """Names of the language model's trained parameters, in order; the teacher follows these."""
    frozen: dict[str, str]
    """Fingerprints of what is frozen and in no checkpoint: the vision tower, layers in 4 bits."""

    @property
    def zero_stage(self) -> int:
        """The student's."""
        return self.layout.zero_stage

    def student_shards(self) -> Iterator[Tensor]:
        """This rank's float32 slice of each weight in `trained`, as the teacher's engine cuts it, in order.

        ZeRO-3: views of the optimizer's master shards. Lower stages cut otherwise, and exchange (collective).
        """
        if self.zero_stage == 3:
            return iter(self._master_shards)
        return self._even_slices.of([part for _, part in self._master_parts()], dist.device())

    @cached_property
    def _master_shards(self) -> list[Tensor]:
        """Read once: DeepSpeed waits for the device each time, and always gives the same memory. The public
        `safe_get_local_fp32_param` would copy shards that are offloaded."""
        student = dict(self.student.module.model.model.language_model.named_parameters())
        optimizer = self.student.optimizer
        return [optimizer._get_fp32_opt_state_partition(student[name], True)[0] for name in self.trained]

    def _master_parts(self) -> list[tuple[int, Tensor]]:
        """Of each weight in `trained`, where the part begins that ZeRO-1 and 2 have here in float32, and that part."""
        student = dict(self.student.module.model.model.language_model.named_parameters())
        fragments = [student[name]._hp_mapping for name in self.trained]
        nothing = torch.empty(0, device=dist.device())
        return [(f.lp_fragment_address.start, f.get_hp_fragment().flatten()) if f else (0, nothing) for f in fragments]

    @cached_property
    def _even_slices(self) -> EvenSlices:
        runs = [(start, start + len(part)) for start, part in self._master_parts()]
        return EvenSlices(runs, [len(shard) for shard in self.teacher_shards()])

    @torch.no_grad()
    def teach_frozen(self) -> None:
        """Give the teacher the student's frozen weights, which a checkpoint may have brought (collective)."""
        if self.teacher is not None:
            _copy_to_teacher(self, set(self.trained))

    def teacher_shards(self) -> list[Tensor]:
        """The flat shard of each weight in `trained` that the teacher's forward reads."""
        teacher = dict(self.teacher.module.language_model.named_parameters())
        return [teacher[name].ds_tensor for name in self.trained]


def build_networks(
    recipe: Recipe,
    file_settings: dict[str, Any],
    config: Any,
    num_tokens: int,
    pixel_stats: tuple[list[float], list[float]],
    initial: Path | None = None,
) -> Networks:
    """Load the student, take its tower apart, start the engines, and copy the student into a teacher.

    pixel_stats: the image processor's channel means and standard deviations. initial: a checkpoint whose weights take
    the place of those at `model.path`.
    """
    settings = deepspeed_settings(recipe, file_settings)
    layout = layout_of(settings)
    zero_stage = layout.zero_stage
    # transformers holds the configuration by a weak reference: it must live until the model is built
    zero3_config = HfDeepSpeedConfig(settings) if zero_stage == 3 else None
    model = _load_model(recipe, num_tokens, is_sharded=zero_stage == 3)
    language_model = model.model.language_model
    vision, frozen = _vision(model, recipe, pixel_stats)
    _use_backends(language_model, recipe)
    if recipe.model.lora_base != "full":
        frozen[LAYERS] = pack_layers(language_model, _gather, dist.device())
    root = _root_module(model, recipe, zero_stage)
    if initial is not None:
        load_weights(initial, root)
    if zero_stage == 3:
        _fetch_by_layer(language_model)
    student = _start_student(root, recipe, settings)
    del zero3_config
    teacher = _build_teacher(recipe, settings, config, model) if recipe.has_teacher else None
    trained = [name for name, parameter in language_model.named_parameters() if parameter.requires_grad]
    networks = Networks(student, teacher, vision, layout, trained, frozen)
    if teacher is not None:
        _copy_to_teacher(networks)
    return networks


def _load_model(recipe: Recipe, num_tokens: int, is_sharded: bool) -> Any:
    torch.manual_seed(recipe.run.seed)  # random weights are the same on every rank
    # a CPU takes minutes to draw billions of random numbers; ZeRO-3 draws on the device anyway
    with dist.device() if recipe.model.random_init and not is_sharded else nullcontext():
        has_tower = not recipe.data.has_features
        return load_student(recipe.model, DTYPES[recipe.train.precision], num_tokens, with_tower=has_tower)


def _vision(
    model: Any, recipe: Recipe, pixel_stats: tuple[list[float], list[float]]
) -> tuple[VisionTower | StoredFeatures, dict[str, str]]:
    """The tower taken out of `model` and its fingerprint, or stored features."""
    dtype, device = DTYPES[recipe.train.precision], dist.device()
    if recipe.data.has_features:
        return StoredFeatures(dtype), {}
    tower = detach_tower(model, _gather)
    frozen = {TOWER: fingerprint(tower.named_parameters())}  # before kernels widen its layers
    use_varlen_attention(tower, device, dtype)
    use_fused_kernels(tower, recipe.model.kernels, device, dtype)
    return VisionTower(tower, *pixel_stats).to(device), frozen


def _use_backends(language_model: Any, recipe: Recipe) -> None:
    """Attention and kernels of the recipe, for student and teacher alike."""
    dtype, device = DTYPES[recipe.train.precision], dist.device()
    if recipe.packs:
        use_packed_attention(language_model, recipe.model.attention, device, dtype)
    use_fused_kernels(language_model, recipe.model.kernels, device, dtype)


def _start_student(root: nn.Module, recipe: Recipe, settings: dict[str, Any]) -> Any:
    """The engine around the stage's root module, with its optimizer."""
    trained = [parameter for parameter in root.parameters() if parameter.requires_grad]
    optimizer = build_optimizer(recipe.optim, trained)
    with _gradients_by_weight(), _one_optimizer_for_all_sums():
        engine, *_ = deepspeed.initialize(model=root, model_parameters=trained, optimizer=optimizer, config=settings)
    mend = keep_until_reduced if layout_of(settings).zero_stage < 3 else gather_when_written
    mend(engine.optimizer)
    return engine


def _root_module(model: Any, recipe: Recipe, zero_stage: int) -> nn.Module:
    """The network of the recipe's stage with its losses."""
    in_fp32 = recipe.train.gradient_precision == "fp32"
    settings, train = recipe.model, recipe.train
    if train.has_whole_chain:
        # transformers' own activation checkpointing switches caches off: the rollout does it itself
        settings = replace(settings, activation_checkpointing="none")
    prepare_student(model, settings)
    if not train.has_free_latents:
        return StageOne(model, recipe.loss, recipe.run.seed, in_fp32)
    checkpointing = recipe.model.activation_checkpointing == "full"
    is_recorded = recipe.model.cuda_graphs == "auto" and zero_stage < 3 and dist.device().type == "cuda"
    return StageTwo(
        model, recipe.loss, recipe.run.seed, settings.latent_size, train.latent_gradient, checkpointing, is_recorded,
        in_fp32,
    )  # fmt: skip


def _build_teacher(recipe: Recipe, student: dict[str, Any], config: Any, model: Any) -> Any:
    settings = teacher_settings(student, recipe.teacher.offload)
    zero3_config = HfDeepSpeedConfig(settings)
    text_config = config.text_config
    text_config.vocab_size = model.config.text_config.vocab_size
    attention = attention_backend(recipe.model.attention, DTYPES[recipe.train.precision])
    language_model = build_text_model(text_config, attention)
    _use_backends(language_model, recipe)
    if recipe.model.lora_rank:
        add_adapters(language_model, recipe.model)
    language_model.requires_grad_(False)
    _fetch_by_layer(language_model)
    # whose projections ContextEncoder calls by themselves: these need hooks of their own
    deepspeed.utils.set_z3_leaf_module(language_model.layers[-1], False)
    teacher, *_ = deepspeed.initialize(model=ContextEncoder(language_model).eval(), config=settings)
    del zero3_config
    return teacher


def _fetch_by_layer(language_model: Any) -> None:
    """Let ZeRO-3 gather and release a decoder layer at a time: its hooks around every module in a layer take the host
    longer than a GPU needs to compute them."""
    deepspeed.utils.set_z3_leaf_modules(language_model, [type(language_model.layers[0])])


@contextmanager
def _gradients_by_weight() -> Iterator[None]:
    """Let an engine take each gradient when it is ready, also in modules that `_fetch_by_layer` marks.

    DeepSpeed (0.19) takes those of a marked module together, by a hook that fires too early where the module's input
    needs no gradient (adapters in the first layer), and once for each call where it is called several times (stage 2).
    """
    before = stage3.z3_leaf_parameter
    stage3.z3_leaf_parameter = lambda _: False
    try:
        yield
    finally:
        stage3.z3_leaf_parameter = before


@contextmanager
def _one_optimizer_for_all_sums() -> Iterator[None]:
    """Let ZeRO-1 keep its optimizer where bf16 gradients are summed in float32.

    DeepSpeed (0.19) would take its BF16_Optimizer there, which sums over ranks after the backward and not beside it,
    keeps float32 gradients of all weights between steps, and has other checkpoints. ZeRO-1's own sums in float32 too.
    """
    before = DeepSpeedEngine._do_optimizer_sanity_check
    DeepSpeedEngine._do_optimizer_sanity_check = lambda engine, optimizer: ZERO_OPTIMIZATION
    try:
        yield
    finally:
        DeepSpeedEngine._do_optimizer_sanity_check = before


@torch.no_grad()
def _copy_to_teacher(networks: Networks, but: Collection[str] = ()) -> None:
    """Every weight of the student's language model, frozen ones too, into the teacher's shards; `but` those named."""
    student = networks.student.module.model.model.language_model
    for name, parameter in networks.teacher.module.language_model.named_parameters():
        if name in but:
            continue
        source, shard = weight_of(student, name), parameter.ds_tensor
        values = source.ds_tensor if hasattr(source, "ds_tensor") else _slice(source, shard.numel())
        if values.numel() != shard.numel():
            sizes = f"{values.numel()} elements in the student, {shard.numel()} in the teacher"
            raise RuntimeError(f"the shards of {name} differ: {sizes}")
        shard.copy_(values)


def _slice(whole: Tensor, size: int) -> Tensor:
    """This rank's `size` elements of a weight cut evenly over the ranks, padded with zeros at the end."""
    flat = whole.detach().flatten()
    padded = torch.nn.functional.pad(flat, (0, size * dist.world_size() - flat.numel()))
    return padded.narrow(0, size * dist.rank(), size)


def _gather(parameters: list[nn.Parameter]) -> AbstractContextManager[Any]:
    context: AbstractContextManager[Any] = deepspeed.zero.GatheredParameters(parameters)
    return context
