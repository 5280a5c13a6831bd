"""What this machine has for training, what is missing, and how to get it (`ilvr-ds doctor`)."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from packaging.specifiers import SpecifierSet

from ilvr_ds.data.shards import open_dataset
from ilvr_ds.errors import UserError
from ilvr_ds.ops import build
from ilvr_ds.provenance import FLASH_ATTN, installed

Status = Literal["ok", "note", "missing", "bad"]
GIB = 2**30
SMALL_DISK_GIB, SMALL_SHM_GIB = 20, 2

_REQUIRED = {
    "torch": ">=2.11,<2.14",
    "transformers": ">=5.17,<5.24",
    "deepspeed": ">=0.19.3",
    "webdataset": ">=1.0.2",
    "peft": ">=0.19",
}
_REINSTALL = "pip install -c constraints.txt ."
_OPTIONAL = {
    "mlflow": "the MLflow pages: pip install '.[ui]'",
    "bitsandbytes": "optim.name: adamw_8bit: pip install bitsandbytes",
    "liger-kernel": "fused activations and rotations on a GPU: pip install liger-kernel",
}


@dataclass(frozen=True)
class Check:
    """One finding. bad: breaks a run; note: may surprise; missing: an optional part is not installed."""

    name: str
    status: Status
    detail: str
    remedy: str = ""


def report() -> list[Check]:
    """All findings, in the order of the table."""
    parts = (_python, _packages, _accelerators, _attention, _operators, _compilers, _space)
    return [check for part in parts for check in part()]


def check_shards(location: str) -> Check:
    """Compare every byte of a packed data set with the checksums of when it was packed."""
    try:
        dataset = open_dataset(location, "full")
    except UserError as error:
        return Check("shards", "bad", str(error))
    return Check("shards", "ok", f"{location}: {len(dataset)} samples in {len(dataset.shard_sizes)} shards, as packed")


def render(checks: list[Check]) -> str:
    """An aligned table; remedies stand below their lines."""
    width = max(len(check.name) for check in checks)
    lines = []
    for check in checks:
        lines.append(f"{check.status:<8} {check.name:<{width}}  {check.detail}")
        if check.remedy:
            lines.append(f"{'':<8} {'':<{width}}  -> {check.remedy}")
    return "\n".join(lines)


def _python() -> Iterator[Check]:
    status: Status = "ok" if sys.version_info >= (3, 10) else "bad"
    yield Check("python", status, sys.version.split()[0], "" if status == "ok" else "use Python 3.10 or newer")


def _packages() -> Iterator[Check]:
    for name, wanted in _REQUIRED.items():
        found = installed(name)
        if found is None:
            yield Check(name, "bad", "not installed", _REINSTALL)
        elif SpecifierSet(wanted).contains(found.split("+")[0], prereleases=True):
            yield Check(name, "ok", found)
        else:
            yield Check(name, "note", f"{found}; tested with {wanted}", _REINSTALL)
    if installed("mlflow-skinny") is None and installed("mlflow") is None:
        yield Check("mlflow-skinny", "bad", "not installed", _REINSTALL)
    for name, purpose in _OPTIONAL.items():
        found = installed(name)
        yield Check(name, "ok", found) if found else Check(name, "missing", "not installed", f"for {purpose}")


def _accelerators() -> Iterator[Check]:
    if not torch.cuda.is_available():
        yield Check("accelerator", "note", "none: ranks run on the CPU and talk through gloo")
        return
    for index in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(index)
        detail = f"{device.name}, {device.total_memory / GIB:.0f} GiB, sm_{device.major}{device.minor}"
        yield Check(f"cuda:{index}", "ok", f"{detail}, CUDA {torch.version.cuda}")


def _attention() -> Iterator[Check]:
    found = [f"{name} {version}" for name in FLASH_ATTN if (version := installed(name))]
    if found:
        yield Check("attention", "ok", ", ".join(found))
    elif torch.cuda.is_available():
        yield Check("attention", "ok", "PyTorch's variable-length attention in 16 bit, SDPA in fp32; no flash-attn")
    else:
        yield Check("attention", "ok", "PyTorch's SDPA, sequence by sequence")


def _operators() -> Iterator[Check]:
    try:
        source = build.status()
    except (build.BuildError, ValueError) as error:
        yield Check("operators", "bad", str(error), "set ILVR_OPS=auto, or install what is missing")
        return
    remedy = ""
    if source.kind == "reference" and torch.cuda.is_available():
        remedy = "selection and its loss run in plain PyTorch: a C++ compiler, ninja and nvcc (CUDA_HOME) change that"
    yield Check("operators", "missing" if remedy else "ok", f"{source.kind}: {source.reason}", remedy)


def _compilers() -> Iterator[Check]:
    for name, need in (("c++", "apt-get install g++"), ("ninja", "pip install ninja")):
        path = shutil.which(name)
        purpose = "DeepSpeed compiles parts of itself at first use"
        yield Check(name, "ok", _version_line(path)) if path else Check(name, "bad", "not found", f"{purpose}: {need}")
    if path := shutil.which("nvcc"):
        yield Check("nvcc", "ok", _version_line(path, last=True))
    elif torch.cuda.is_available():
        yield Check("nvcc", "missing", "not found", "for optim.name: cpu_adam: install the CUDA toolkit")


def _space() -> Iterator[Check]:
    cache = os.environ.get("TORCH_EXTENSIONS_DIR")
    yield Check("extension cache", "ok", cache or "~/.cache/torch_extensions (TORCH_EXTENSIONS_DIR is not set)")
    for name, place in (("working directory", Path.cwd()), ("temporary files", Path(tempfile.gettempdir()))):
        free = shutil.disk_usage(place).free / GIB
        status: Status = "ok" if free > SMALL_DISK_GIB else "note"
        yield Check(name, status, f"{place}, {free:.0f} GiB free")
    shared = Path("/dev/shm")
    if shared.is_dir():
        size = shutil.disk_usage(shared).total / GIB
        few = size < SMALL_SHM_GIB
        remedy = "loader workers need more: docker run --shm-size=16g, or data.num_workers: 0" if few else ""
        yield Check("shared memory", "note" if few else "ok", f"{size:.1f} GiB", remedy)


def _version_line(path: str, last: bool = False) -> str:
    output = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=30, check=False).stdout
    lines = output.strip().splitlines() or [path]
    return lines[-1 if last else 0]
