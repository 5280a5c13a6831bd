"""DeepSpeed's door: the student's engine, the teacher's engine, and the shards of their weights.

Three networks stand here: the student (ZeRO engine with optimizer), the frozen vision tower (one plain copy per
device, outside any engine; none where its features are stored) and, where there are targets, the teacher's language
model (an engine without an optimizer, always ZeRO-3, with its shards in host memory unless `teacher.offload` is none).
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import deepspeed
import torch
from deepspeed.ops.op_builder import CPUAdamBuilder
from deepspeed.ops.op_builder.cpu import ShareMemCommBuilder
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.runtime.zero import stage3
from deepspeed.runtime.zero.config import ZERO_OPTIMIZATION
from torch import Tensor, nn
from transformers.integrations import HfDeepSpeedConfig

from ilvr_ds import dist
from ilvr_ds.checkpoint.load import LAYERS, TOWER
from ilvr_ds.config import ModelConfig, OptimConfig, Recipe
from ilvr_ds.distill.query import ContextEncoder
from ilvr_ds.distill.stage1 import StageOne
from ilvr_ds.distill.stage2 import StageTwo
from ilvr_ds.engine.build_locks import building
from ilvr_ds.engine.even_slices import EvenSlices
from ilvr_ds.engine.initial import load_weights
from ilvr_ds.engine.settings import deepspeed_settings, teacher_settings
from ilvr_ds.errors import UserError
from ilvr_ds.model.fingerprint import fingerprint
from ilvr_ds.model.layers.adapters import add_adapters
from ilvr_ds.model.layers.attention import attention_backend, use_packed_attention, use_varlen_attention
from ilvr_ds.model.layers.four_bit import pack_layers, weight_of
from ilvr_ds.model.layers.fused import use_fused_kernels
from ilvr_ds.model.student import build_text_model, detach_tower, load_student, prepare_student
from ilvr_ds.model.vision import StoredFeatures, VisionTower

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def init_process_group(timeout_s: float = 1800.0) -> None:
    """Join the job; a process without a launcher becomes a job of one. All collectives fail after `timeout_s`."""
    dist.enter()
    timeout = timedelta(seconds=timeout_s)
    dist.set_patience(timeout)
    # of its collectives in shared memory only tensor-parallel inference makes use; they take a minute to compile
    deepspeed.ops.__compatible_ops__[ShareMemCommBuilder.NAME] = False
    deepspeed.init_distributed(dist_backend=dist.backend(), timeout=timeout, verbose=False)


@dataclass
class Networks:
    """What `build_networks` returns."""

    student: Any
    """DeepSpeed engine around a StageOne or a StageTwo."""
    teacher: Any
    """DeepSpeed engine around a ContextEncoder; None where no loss of stage 2 asks for targets."""
    vision: VisionTower | StoredFeatures
    zero_stage: int
    trained: list[str]
    """Names of the language model's trained parameters, in order; the teacher follows these."""
    frozen: dict[str, str]
    """Fingerprints of what is frozen and in no checkpoint: the vision tower, layers in 4 bits."""

    def student_shards(self) -> Iterator[Tensor]:
        """This rank's float32 slice of each weight in `trained`, as the teacher's engine cuts it, in order.

        ZeRO-3: views of the optimizer's master shards. Lower stages cut otherwise, and exchange (collective).
        """
        if self.zero_stage == 3:
            return iter(self._master_shards)
        return self._even_slices.of([part for _, part in self._master_parts()], dist.device())

    @cached_property
    def _master_shards(self) -> list[Tensor]:
        """Asked for once: DeepSpeed waits for the device each time, and always gives the same memory."""
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
    dtype, device = DTYPES[recipe.train.precision], dist.device()
    settings = deepspeed_settings(recipe, file_settings)
    zero_stage = int(settings.get("zero_optimization", {}).get("stage", 0))
    # transformers holds the configuration by a weak reference: it lives as long as this variable
    birth = HfDeepSpeedConfig(settings) if zero_stage == 3 else None
    torch.manual_seed(recipe.run.seed)  # weights that are drawn are the same on every rank
    is_stored = recipe.data.features is not None
    frozen: dict[str, str] = {}
    # billions of random numbers take a CPU minutes; ZeRO-3 draws on the device anyway
    with device if recipe.model.random_init and birth is None else nullcontext():
        model = load_student(recipe.model, dtype, num_tokens, with_tower=not is_stored)
    vision: VisionTower | StoredFeatures = StoredFeatures(dtype)
    if not is_stored:
        tower = detach_tower(model, _gather)
        frozen[TOWER] = fingerprint(tower.named_parameters())
        vision = _prepared_tower(tower, recipe.model, pixel_stats, device, dtype)
    if recipe.packs:
        use_packed_attention(model.model.language_model, recipe.model.attention, device, dtype)
    use_fused_kernels(model.model.language_model, recipe.model.kernels, device, dtype)
    if recipe.model.lora_base != "full":
        frozen[LAYERS] = pack_layers(model.model.language_model, _gather, device)
    root = _root_module(model, recipe, zero_stage)
    if initial is not None:
        load_weights(initial, root)
    if zero_stage == 3:
        _fetch_by_layer(model.model.language_model)
    trained = [p for p in root.parameters() if p.requires_grad]
    with _gradients_by_weight(), _one_optimizer_for_all_sums():
        student, *_ = deepspeed.initialize(
            model=root, model_parameters=trained, optimizer=_optimizer(recipe.optim, trained), config=settings
        )
    del birth
    teacher = _build_teacher(recipe, settings, config, model) if recipe.has_teacher else None
    names = [n for n, p in model.model.language_model.named_parameters() if p.requires_grad]
    networks = Networks(student, teacher, vision, zero_stage, names, frozen)
    if teacher is not None:
        _copy_to_teacher(networks)
    return networks


def _prepared_tower(
    tower: nn.Module,
    settings: ModelConfig,
    pixel_stats: tuple[list[float], list[float]],
    device: torch.device,
    dtype: torch.dtype,
) -> VisionTower:
    use_varlen_attention(tower, device, dtype)
    use_fused_kernels(tower, settings.kernels, device, dtype)
    return VisionTower(tower, *pixel_stats).to(device)


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
    birth = HfDeepSpeedConfig(settings)
    text_config = config.text_config
    text_config.vocab_size = model.config.text_config.vocab_size
    dtype = DTYPES[recipe.train.precision]
    language_model = build_text_model(text_config, attention_backend(recipe.model.attention, dtype))
    if recipe.packs:
        use_packed_attention(language_model, recipe.model.attention, dist.device(), dtype)
    use_fused_kernels(language_model, recipe.model.kernels, dist.device(), dtype)
    if recipe.model.lora_rank:
        add_adapters(language_model, recipe.model)
    language_model.requires_grad_(False)
    _fetch_by_layer(language_model)
    # whose projections ContextEncoder calls by themselves: these need hooks of their own
    deepspeed.utils.set_z3_leaf_module(language_model.layers[-1], False)
    teacher, *_ = deepspeed.initialize(model=ContextEncoder(language_model).eval(), config=settings)
    del birth
    return teacher


def _fetch_by_layer(language_model: Any) -> None:
    """Let ZeRO-3 gather and release a decoder layer at a time: its hooks around every module in a layer take the host
    longer than a GPU needs to compute them."""
    deepspeed.utils.set_z3_leaf_modules(language_model, [type(language_model.layers[0])])


@contextmanager
def _gradients_by_weight() -> Iterator[None]:
    """Let an engine take each gradient when it is there, also in what `_fetch_by_layer` marks.

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
    keeps float32 gradients of all weights between steps, and whose checkpoints are others. ZeRO-1's own sums as well.
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


def check_optimizer(name: str, file_settings: dict[str, Any]) -> None:
    """Raise UserError where the optimizer cannot run, before anything is loaded."""
    if name.endswith("8bit") and find_spec("bitsandbytes") is None:
        raise UserError(f"optim.name is {name}: needs bitsandbytes; pip install bitsandbytes")
    offload = file_settings.get("zero_optimization", {}).get("offload_optimizer") or {}
    if name == "cpu_adam" and dist.device().type == "cuda" and offload.get("device") != "cpu":
        raise UserError(
            "optim.name is cpu_adam: needs offload_optimizer in the file that deepspeed.config names, as "
            "ds_configs/zero3_offload_optimizer.json has it"
        )


def apply_settings(student: Any, settings: OptimConfig) -> None:
    """The recipe's settings in place of those that a checkpoint has brought back; the rate is set at each step."""
    for group in student.optimizer.param_groups:
        group.update(_common(settings), lr=group["lr"])
    if hasattr(student.optimizer, "clip_grad"):  # ZeRO-1 and 2 read it back too
        student.optimizer.clip_grad = settings.max_grad_norm


def _common(settings: OptimConfig) -> dict[str, Any]:
    """What all optimizers are told."""
    return {
        "lr": settings.lr,
        "betas": (settings.beta1, settings.beta2),
        "eps": settings.eps,
        "weight_decay": settings.weight_decay,
    }


def _optimizer(settings: OptimConfig, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    common = _common(settings)
    if settings.name == "adamw":
        return torch.optim.AdamW(parameters, fused=True, **common)
    if settings.name == "cpu_adam":
        with building("cpu_adam"):
            CPUAdamBuilder().load()
        optimizer: torch.optim.Optimizer = deepspeed.ops.adam.DeepSpeedCPUAdam(parameters, adamw_mode=True, **common)
        return optimizer
    import bitsandbytes

    cls = bitsandbytes.optim.AdamW8bit if settings.name == "adamw_8bit" else bitsandbytes.optim.PagedAdamW8bit
    quantised: torch.optim.Optimizer = cls(parameters, **common)
    return quantised
