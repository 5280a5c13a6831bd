"""Finds, builds and loads the operators' CUDA code.

Prebuilt by `ILVR_BUILD_OPS=1 pip install .`, else compiled by ninja at first use on a GPU into the user's cache, else
absent: the reference computes, as it always does on a CPU. On GPUs ILVR_OPS=native refuses the reference, and
ILVR_OPS=reference refuses native code.
"""

from __future__ import annotations

import fcntl
import hashlib
import logging
import os
import platform
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

logger = logging.getLogger("ilvr_ds")

DEFAULT_ARCHITECTURES = "8.0;9.0;10.0+PTX"
"""What is built ahead of time for where TORCH_CUDA_ARCH_LIST is not set."""

_HERE = Path(__file__).resolve()
_SCRIPTS = Path(sys.executable).parent  # where pip puts ninja; not on PATH when the environment is not activated
_CPP_FLAGS = ["-O3", "-g0"]
_CUDA_FLAGS = ["-O3", "-lineinfo"]


class BuildError(RuntimeError):
    """The native operators were asked for and cannot be had, or their build failed."""


@dataclass(frozen=True)
class Source:
    """What the operators run in on GPUs, and why."""

    kind: Literal["prebuilt", "just-in-time", "reference"]
    reason: str
    library: Path | None = None
    exists: bool = False
    """Whether the library has been built."""


def use_native(device: str) -> bool:
    """Whether operators on this kind of device ("cpu", "cuda") run in native code; on a GPU the first call loads or
    builds it.

    torch.compile follows this once the library is loaded: call an operator, or `load`, before.
    """
    return device == "cuda" and (_loaded or load()).kind != "reference"


def load() -> Source:
    """Load the native operators, after building them where needed, and register what Python adds to them.

    Raises BuildError where a build fails, or where ILVR_OPS=native cannot be had.
    """
    global _loaded
    if _loaded is None:
        source = status()
        if source.library is None:
            # one warning for all ranks, and none where it was asked for
            is_quiet = _requested() == "reference" or os.environ.get("RANK", "0") != "0"
            level = logging.INFO if is_quiet else logging.WARNING
            logger.log(level, "selective-feature operators run in plain PyTorch: %s", source.reason)
        else:
            if not source.exists:
                _build(source.library)
            torch.ops.load_library(str(source.library))  # type: ignore[no-untyped-call]
            for register in _registrations:
                register()
        _loaded = source
    return _loaded


def when_loaded(register: Callable[[], None]) -> Callable[[], None]:
    """Decorator: call `register` as soon as the operators exist."""
    if _loaded is not None and _loaded.library is not None:
        register()
    else:
        _registrations.append(register)
    return register


def status() -> Source:
    """What operators run in, or would on first use; builds nothing.

    Raises BuildError where ILVR_OPS=native cannot be had.
    """
    if _loaded is not None:
        return _loaded
    if _requested() == "reference":
        return Source("reference", "ILVR_OPS=reference")
    prebuilt = _HERE.parent / f"{library_name()}.so"
    if prebuilt.exists():
        return Source("prebuilt", str(prebuilt), prebuilt, exists=True)
    if missing := _missing():
        if _requested() == "native":
            raise BuildError(f"ILVR_OPS=native, but {missing}")
        return Source("reference", missing)
    library = _cache_root() / f"ilvr_ds_{_build_key(_architectures())}" / f"{library_name()}.so"
    exists = (library.parent / "complete").exists()
    return Source("just-in-time", f"{library}{'' if exists else ' (not built yet)'}", library, exists)


def sources() -> Path:
    """The folder csrc: beside the package in a checkout, inside it when installed."""
    for folder in (_HERE.parents[2] / "csrc", _HERE.parents[1] / "csrc"):
        if (folder / "bindings.cpp").exists():
            return folder
    raise BuildError(f"no csrc beside or inside {_HERE.parents[1]}: the package was installed without its sources")


def library_name() -> str:
    """The library's name holds a digest of its sources, so that one built from others is never loaded."""
    return f"_native_{_digest(*(p.read_bytes() for p in _files()))[:12]}"


def ahead_of_time() -> dict[str, Any]:
    """Arguments for setup(): the extension, built for TORCH_CUDA_ARCH_LIST whether or not a GPU is visible.

    Raises BuildError without CUDA.
    """
    from torch.utils import cpp_extension

    if missing := _missing_cuda():
        raise BuildError(f"ILVR_BUILD_OPS=1, but {missing}")
    os.environ.setdefault("TORCH_CUDA_ARCH_LIST", DEFAULT_ARCHITECTURES)
    root = sources().parent
    kind: Any = cpp_extension.CUDAExtension
    extension = kind(
        f"ilvr_ds.ops.{library_name()}",
        [str(path.relative_to(root)) for path in _compiled()],
        extra_compile_args={"cxx": _CPP_FLAGS, "nvcc": _CUDA_FLAGS},
    )
    command: Any = cpp_extension.BuildExtension
    return {"ext_modules": [extension], "cmdclass": {"build_ext": command.with_options(no_python_abi_suffix=True)}}


_loaded: Source | None = None
_registrations: list[Callable[[], None]] = []


def _requested() -> str:
    requested = os.environ.get("ILVR_OPS", "auto")
    if requested not in ("auto", "native", "reference"):
        raise ValueError(f"ILVR_OPS={requested}: expected auto, native or reference")
    return requested


def _missing() -> str:
    """What a build at first use lacks, or ""."""
    compiler = os.environ.get("CXX", "c++")
    if missing := _missing_cuda():
        return missing
    if shutil.which(compiler) is None:
        return f"no C++ compiler ({compiler} not found)"
    if not (shutil.which("ninja") or (_SCRIPTS / "ninja").exists()):
        return "ninja not found"
    return "" if _architectures() else "no GPU is visible and TORCH_CUDA_ARCH_LIST is not set"


def _missing_cuda() -> str:
    """What any build lacks, or ""."""
    if torch.version.cuda is None:
        return "this torch has no CUDA"
    from torch.utils import cpp_extension

    return "no nvcc (set CUDA_HOME)" if cpp_extension.CUDA_HOME is None else ""


def _architectures() -> str:
    """GPU architectures to build for, as TORCH_CUDA_ARCH_LIST has them; "" where none is known."""
    if chosen := os.environ.get("TORCH_CUDA_ARCH_LIST"):
        return chosen
    seen = {torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())}
    return ";".join(f"{major}.{minor}" for major, minor in sorted(seen))


def _cache_root() -> Path:
    chosen = os.environ.get("TORCH_EXTENSIONS_DIR")
    return Path(chosen) if chosen else Path.home() / ".cache" / "torch_extensions"


def _build_key(architectures: str) -> str:
    flags = (*_CPP_FLAGS, *_CUDA_FLAGS)
    parts = (library_name(), torch.__version__, torch.version.cuda, architectures, platform.machine(), flags)
    return _digest(*(str(part).encode() for part in parts))[:16]


def _build(library: Path) -> None:
    """Compile into the library's folder, one process at a time; the others find it there."""
    folder = library.parent
    folder.mkdir(parents=True, exist_ok=True)
    # the system gives this lock back when a process dies, which torch's own lock file does not survive
    # said before the lock is there: on some rank it is only waited for
    logger.info("building the selective-feature operators in %s, once for this GPU; it takes about a minute", folder)
    start = time.monotonic()
    with (folder / "building").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "complete").exists():
            (folder / "lock").unlink(missing_ok=True)
            _compile(library)
            (folder / "complete").touch()
    logger.info("the selective-feature operators are built, after %.0f s", time.monotonic() - start)


def _compile(library: Path) -> None:
    from torch.utils import cpp_extension

    before = {name: os.environ.get(name) for name in ("PATH", "TORCH_CUDA_ARCH_LIST")}
    os.environ["TORCH_CUDA_ARCH_LIST"] = _architectures()
    os.environ["PATH"] = f"{before['PATH'] or os.defpath}{os.pathsep}{_SCRIPTS}"
    try:
        cpp_extension.load(
            library.stem,
            [str(path) for path in _compiled()],
            extra_cflags=_CPP_FLAGS,
            extra_cuda_cflags=_CUDA_FLAGS,
            build_directory=str(library.parent),
            is_python_module=False,
        )
    except RuntimeError as error:
        last = "\n".join(str(error).strip().splitlines()[-30:])
        raise BuildError(
            f"building the selective-feature operators failed (ILVR_OPS=reference does without):\n{last}"
        ) from error
    finally:
        for name, value in before.items():
            os.environ.pop(name, None) if value is None else os.environ.__setitem__(name, value)


def _compiled() -> list[Path]:
    return [path for path in _files() if path.suffix in (".cpp", ".cu")]


def _files() -> list[Path]:
    return sorted(path for path in sources().rglob("*") if path.suffix in (".cpp", ".cu", ".h", ".cuh"))


def _digest(*parts: bytes) -> str:
    whole = hashlib.sha256()
    for part in parts:
        whole.update(hashlib.sha256(part).digest())
    return whole.hexdigest()
