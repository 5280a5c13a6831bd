"""A ZeRO checkpoint as a model folder that the stock model loads: weights tensor by tensor, never all at once.

The language model and the head come from the checkpoint's fp32 master weights. The vision tower stands outside the
training engine and is frozen: its weights come from the base model's files. Names are those of the
family's releases.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from ilvr_ds.checkpoint.best import best_checkpoint
from ilvr_ds.checkpoint.compatible import LAYERS, TOWER, check_frozen_is_the_same
from ilvr_ds.checkpoint.files import list_checkpoints, newest_intact, saved_state
from ilvr_ds.checkpoint.load import read_student_weights
from ilvr_ds.config import ModelConfig
from ilvr_ds.data.images import ImageEncoder
from ilvr_ds.data.tokens import load_tokenizer
from ilvr_ds.errors import UserError
from ilvr_ds.evaluation.card import write_card
from ilvr_ds.evaluation.stock_files import copy_side_files, write_config, write_image_processor, write_tokenizer
from ilvr_ds.file_modes import follow_umask
from ilvr_ds.model.base_weights import linear_weights, tower_weights
from ilvr_ds.model.families import Family, family_of
from ilvr_ds.model.fingerprint import fingerprint
from ilvr_ds.model.hub import model_folder
from ilvr_ds.model.layers.four_bit import check_base, round_trip
from ilvr_ds.model.student import DTYPES, load_config
from ilvr_ds.tracking.registry import is_exported, write_origin
from ilvr_ds.unfinished import finish, unfinished_folder

SHARD_BYTES = 4 * 1024**3
"""Tensors that wait to be written hold at most this much, plus the last one."""
Named = tuple[str, Tensor]


def export(
    source: Path, to: Path, adapters: str, precision: str | None, overwrite: bool, best: bool = False
) -> list[str]:
    """Write the model of a run's newest or best checkpoint, or of one checkpoint, to `to`; returns what was done as
    lines.

    adapters: "merge" adds LoRA to the weights; "apart" leaves them as the base has them and writes `to`/adapter for
    peft. precision None: the run's. overwrite: an exported model at `to` is replaced, and nothing else. Written under
    another name and renamed at the end. Images are limited as the run's were. Every file of the checkpoint is checked;
    a run's newest one that is damaged is passed over with a warning. Raises UserError.
    """
    candidates = [_find_best(source)] if best else _find(source)
    _check_target(to, candidates[-1], overwrite)  # before gigabytes are read
    checkpoint = newest_intact(candidates)
    state = saved_state(checkpoint)
    recipe = state["recipe"]
    settings = ModelConfig(**{**recipe["model"], "lora_targets": tuple(recipe["model"]["lora_targets"])})
    check_base(settings.lora_base)
    settings = replace(settings, path=model_folder(settings.path, state.get("model_commit")))
    _check_frozen(checkpoint, settings, DTYPES[recipe["train"]["precision"]])
    dtype = DTYPES[precision or recipe["train"]["precision"]]
    config = load_config(settings.path)
    tokenizer, special = load_tokenizer(settings.path)
    try:
        with unfinished_folder(to) as partial:
            student = _Student(read_student_weights(checkpoint), settings, DTYPES[recipe["train"]["precision"]])
            config.text_config.vocab_size = student.rows
            written = _write_weights(partial, _all_weights(student, settings, config, adapters == "merge"), dtype)
            if settings.lora_rank and adapters == "apart":
                student.write_adapter(partial / "adapter", dtype, to.resolve(), family_of(config))
            write_config(partial, config, special, settings.latent_size, dtype)
            write_tokenizer(partial, tokenizer)
            write_image_processor(partial, ImageEncoder(settings.path, recipe["data"]["max_image_pixels"]))
            copy_side_files(settings.path, partial)
            write_card(partial, state, checkpoint, dtype, family_of(config), special)
            write_origin(partial, state, checkpoint)
            for file in [path for path in partial.rglob("*") if path.is_file()]:
                follow_umask(file)
            _check_target(to, checkpoint, overwrite)  # another export may have ended meanwhile
            if to.exists():
                shutil.rmtree(to)
            finish(partial, to)
    except (OSError, SafetensorError) as error:
        raise UserError(f"--to: cannot write {to} ({error})") from error
    return [f"{to}: step {state['step']} of {checkpoint.parent.parent.name}, {written / 1e9:.3g} GB, {dtype}"]


def _check_target(to: Path, checkpoint: Path, overwrite: bool) -> None:
    if to.exists() and not to.is_dir():
        raise UserError(f"--to: {to} is a file; give a folder")
    if checkpoint.resolve().is_relative_to(to.resolve()):
        raise UserError(f"--to: {to} holds the checkpoint that is to be exported; give another folder")
    if to.is_dir() and any(to.iterdir()):
        if not overwrite:
            raise UserError(f"--to: {to} is not empty; give another folder or --overwrite")
        if not is_exported(to):
            raise UserError(f"--to: {to} holds something other than an exported model and is not overwritten")
        if (to / "evaluation").exists():
            raise UserError(f"--to: {to / 'evaluation'} holds scores of the model there; move it away, or delete it")


def _check_frozen(checkpoint: Path, settings: ModelConfig, dtype: torch.dtype) -> None:
    """Raise UserError where what the checkpoint does not hold is not what the run computed with, in `dtype`."""
    sources = {TOWER: (tower_weights, "visual."), LAYERS: (linear_weights, "model.")}
    found = {
        what: fingerprint((name.removeprefix(prefix), weight.to(dtype)) for name, weight in weights(settings))
        for what, (weights, prefix) in sources.items()
        if what in saved_state(checkpoint).get("frozen", {})
    }
    check_frozen_is_the_same(checkpoint, found, settings.path)


def _find(source: Path) -> list[Path]:
    """The checkpoints that a run's or a checkpoint's folder stands for, oldest first."""
    if (source / "state.json").is_file():
        return [source]
    found = list_checkpoints(source / "checkpoints") or list_checkpoints(source)
    if not found:
        raise UserError(f"{source}: is neither a run nor a checkpoint; expected {source}/checkpoints/step-...")
    return found


def _find_best(run: Path) -> Path:
    """The checkpoint of a run that `checkpoint.keep_best` kept."""
    found = best_checkpoint(run / "checkpoints")
    if found is None:
        raise UserError(
            f"{run}: keeps no best checkpoint; it does with checkpoint.keep_best: eval/ce. Leave --best out for its "
            "newest"
        )
    return found


class _Student:
    """The weights of a checkpoint, named as `Family.hub_name` takes them, with or without adapters."""

    def __init__(self, weights: dict[str, Any], settings: ModelConfig, dtype: torch.dtype) -> None:
        self.weights = {name.removeprefix("model."): lazy for name, lazy in weights.items()}
        self.settings = settings
        self.dtype = dtype
        """That the run computed in"""

    @property
    def rows(self) -> int:
        """Rows of the embedding."""
        return int(self.weights["model.language_model.embed_tokens.weight"].shape[0])

    def plain(self, merge: bool) -> Iterator[Named]:
        """Everything but the adapters, added to the weights if `merge`."""
        for name in self.weights:
            if "lora_" not in name:
                hub = name.replace(".base_layer.", ".").replace("model.language_model.", "model.", 1)
                yield hub, self._adapted(hub, self._read(name), merge)
        if self.settings.lora_base != "full":  # not in the checkpoint: as they were computed with, on such a device
            device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
            for hub, weight in linear_weights(self.settings):
                yield hub, self._adapted(hub, round_trip(weight.to(device, self.dtype)).cpu(), merge)

    def _adapted(self, hub: str, weight: Tensor, merge: bool) -> Tensor:
        """The weight of that name with its adapter, where there is one and it is to be merged."""
        adapter = hub.replace("model.", "model.language_model.", 1).removesuffix("weight") + "lora_{}.default.weight"
        if not merge or adapter.format("A") not in self.weights:
            return weight
        down, up = (self._read(adapter.format(part)).float() for part in "AB")
        return weight.float() + self.settings.lora_alpha / self.settings.lora_rank * (up @ down)

    def write_adapter(self, folder: Path, dtype: torch.dtype, base: Path, family: Family) -> None:
        """The adapters in peft's layout, for the model that will lie in `base`; AutoPeftModel opens both."""
        folder.mkdir()
        names = [name for name in self.weights if "lora_" in name]
        tensors = {f"base_model.model.{n.replace('.default', '')}": self._read(n).to(dtype) for n in names}
        save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
        content = {
            "peft_type": "LORA",
            "r": self.settings.lora_rank,
            "lora_alpha": self.settings.lora_alpha,
            "target_modules": rf".*language_model.*\.({'|'.join(self.settings.lora_targets)})",
            "base_model_name_or_path": str(base),
            "auto_mapping": {
                "base_model_class": family.model.__name__,
                "parent_library": family.model.__module__,
            },
            "bias": "none",
            "inference_mode": True,
        }
        (folder / "adapter_config.json").write_text(json.dumps(content, indent=1))

    def _read(self, name: str) -> Tensor:
        tensor: Tensor = self.weights[name].contiguous()
        return tensor


def _all_weights(student: _Student, settings: ModelConfig, config: Any, merge: bool) -> Iterator[Named]:
    hub_name = family_of(config).hub_name
    for name, tensor in student.plain(merge):
        if name != "lm_head.weight" or not config.tie_word_embeddings:
            yield hub_name(name), tensor
    for name, tensor in tower_weights(settings):
        yield hub_name(name), tensor


def _write_weights(folder: Path, weights: Iterator[Named], dtype: torch.dtype) -> int:
    """Sharded safetensors with an index; returns the bytes of all tensors."""
    files: list[list[str]] = []
    waiting: dict[str, Tensor] = {}
    total = 0

    def flush() -> None:
        if waiting:
            save_file(waiting, folder / f"part-{len(files)}", metadata={"format": "pt"})
            files.append(list(waiting))
            waiting.clear()

    for name, tensor in weights:
        waiting[name] = tensor.to(dtype).clone()
        total += waiting[name].nbytes
        if sum(t.nbytes for t in waiting.values()) >= SHARD_BYTES:
            flush()
    flush()
    place: dict[str, str] = {}
    for number, names in enumerate(files):
        file = f"model-{number + 1:05d}-of-{len(files):05d}.safetensors"
        (folder / f"part-{number}").rename(folder / file)
        place |= dict.fromkeys(names, file)
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(place.items()))}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))
    return total
