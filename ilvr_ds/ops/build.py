"""Where the operators' native code comes from.

Prebuilt by `ILVR_BUILD_OPS=1 pip install .`, else compiled by ninja at first use into the user's cache, else absent:
the reference computes. ILVR_OPS=native refuses the reference, ILVR_OPS=reference refuses native code.
"""

from __future__ import annotations

import fcntl
import hashlib
import logging
import os
import platform
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

logger = logging.getLogger("ilvr_ds")

DEFAULT_ARCHITECTURES = "8.0;9.0;10.0+PTX"
"""Built ahead of time without TORCH_CUDA_ARCH_LIST."""

_HERE = Path(__file__).resolve()
_SCRIPTS = Path(sys.executable).parent  # where pip puts ninja; not on PATH when the environment is not activated
# no -lgomp: the OpenMP runtime is torch's own, and linking a second one would double the threads
_CPP_FLAGS = ["-O3", "-g0", "-fopenmp"]
_CUDA_FLAGS = ["-O3", "-lineinfo"]


class BuildError(RuntimeError):
    """The native operators were asked for, or could have been built, and the build failed."""


@dataclass(frozen=True)
class Source:
    """Where operators run, and why."""

    kind: Literal["prebuilt", "just-in-time", "reference"]
    devices: frozenset[str]
    """kinds of device with native code; on others the reference computes"""
    reason: str
    library: Path | None = None
    exists: bool = False
    """a just-in-time library that was built before"""


def use_native(device: str) -> bool:
    """Whether operators on this kind of device ("cpu", "cuda") run in native code; the first call loads or builds it.

    torch.compile follows this once the library is loaded: call an operator, or `load`, before.
    """
    return device in (_loaded or load()).devices


def load() -> Source:
    """Load the native operators, after building them where that is needed, and register what Python adds to them.

    Raises BuildError where a build fails, or where ILVR_OPS=native cannot be had.
    """
    global _loaded
    if _loaded is None:
        source = status()
        if source.kind == "reference":
            _say("selective-feature operators run in plain PyTorch: %s", source)
        else:
            assert source.library is not None
            if not source.exists:
                _build(source)
            torch.ops.load_library(str(source.library))  # type: ignore[no-untyped-call]
            for register in _registrations:
                register()
            if torch.cuda.is_available() and "cuda" not in source.devices:
                _say("selective-feature operators run in plain PyTorch on GPUs: %s", source)
        _loaded = source
    return _loaded


def when_loaded(register: Callable[[], None]) -> Callable[[], None]:
    """Have fake kernels registered as soon as the operators exist."""
    if _loaded is not None and _loaded.devices:
        register()
    else:
        _registrations.append(register)
    return register


def status() -> Source:
    """Where operators run or would run on first use; builds nothing.

    Raises BuildError where ILVR_OPS=native cannot be had.
    """
    if _loaded is not None:
        return _loaded
    if _wish() == "reference":
        return Source("reference", frozenset(), "ILVR_OPS=reference")
    prebuilt = _HERE.parent / f"{library_name()}.so"
    if prebuilt.exists():
        # the list of CUDA kernels is known only once it is loaded; ahead of time they are built whenever torch has CUDA
        return Source("prebuilt", _devices(torch.version.cuda is not None), str(prebuilt), prebuilt, exists=True)
    if missing := _missing_tools():
        if _wish() == "native":
            raise BuildError(f"ILVR_OPS=native, but {missing}")
        return Source("reference", frozenset(), missing)
    architectures, without_cuda = _gpu_target()
    if _wish() == "native" and architectures is None and torch.cuda.is_available():
        raise BuildError(f"ILVR_OPS=native, but no kernels for the GPU: {without_cuda}")
    folder = _cache_root() / f"ilvr_ds_{_build_key(architectures)}"
    library = folder / f"{library_name()}.so"
    exists = (folder / "complete").exists()
    reason = f"{library}{'' if exists else ' (not built yet)'}"
    if architectures is None and torch.version.cuda is not None:
        reason += f"; without CUDA: {without_cuda}"
    return Source("just-in-time", _devices(architectures is not None), reason, library, exists)


def sources() -> Path:
    """The folder csrc: beside the package in a checkout, inside it when installed."""
    for folder in (_HERE.parents[2] / "csrc", _HERE.parents[1] / "csrc"):
        if (folder / "bindings.cpp").exists():
            return folder
    raise BuildError(f"no csrc beside or inside {_HERE.parents[1]}: the package was installed without its sources")


def library_name() -> str:
    """Names the library after its sources, so that one built from others is never loaded."""
    return f"_native_{_digest(*(p.read_bytes() for p in _files('*')))[:12]}"


def ahead_of_time() -> dict[str, Any]:
    """Arguments for setup(): the extension, built for TORCH_CUDA_ARCH_LIST whether or not a GPU is visible."""
    from torch.utils import cpp_extension

    with_cuda = torch.version.cuda is not None
    if with_cuda:
        if cpp_extension.CUDA_HOME is None:
            raise BuildError(f"this torch has CUDA {torch.version.cuda}, but there is no nvcc: set CUDA_HOME")
        os.environ.setdefault("TORCH_CUDA_ARCH_LIST", DEFAULT_ARCHITECTURES)
    kind: Any = cpp_extension.CUDAExtension if with_cuda else cpp_extension.CppExtension
    root = sources().parent
    extension = kind(
        f"ilvr_ds.ops.{library_name()}",
        [str(p.relative_to(root)) for p in _compiled(with_cuda)],
        extra_compile_args={"cxx": _CPP_FLAGS, "nvcc": _CUDA_FLAGS},
    )
    command: Any = cpp_extension.BuildExtension
    return {"ext_modules": [extension], "cmdclass": {"build_ext": command.with_options(no_python_abi_suffix=True)}}


_loaded: Source | None = None
_registrations: list[Callable[[], None]] = []


def _say(message: str, source: Source) -> None:
    """Once for all ranks, and as a warning unless it was asked for."""
    wanted = _wish() == "reference" or os.environ.get("RANK", "0") != "0"
    logger.log(logging.INFO if wanted else logging.WARNING, message, source.reason)


def _wish() -> str:
    wish = os.environ.get("ILVR_OPS", "auto")
    if wish not in ("auto", "native", "reference"):
        raise ValueError(f"ILVR_OPS={wish}: expected auto, native or reference")
    return wish


def _devices(with_cuda: bool) -> frozenset[str]:
    return frozenset({"cpu", "cuda"} if with_cuda else {"cpu"})


def _missing_tools() -> str:
    """What the CPU's build lacks, or ""."""
    compiler = os.environ.get("CXX", "c++")
    if shutil.which(compiler) is None:
        return f"no C++ compiler ({compiler} not found)"
    return "" if shutil.which("ninja") or (_SCRIPTS / "ninja").exists() else "ninja not found"


def _gpu_target() -> tuple[str | None, str]:
    """GPU architectures to build for, or None and why."""
    if torch.version.cuda is None:
        return None, "this torch has no CUDA"
    from torch.utils import cpp_extension

    if cpp_extension.CUDA_HOME is None:
        return None, "no nvcc (set CUDA_HOME)"
    if chosen := os.environ.get("TORCH_CUDA_ARCH_LIST"):
        return chosen, ""
    if not torch.cuda.is_available():
        return None, "no GPU is visible and TORCH_CUDA_ARCH_LIST is not set"
    seen = {torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())}
    return ";".join(f"{major}.{minor}" for major, minor in sorted(seen)), ""


def _cache_root() -> Path:
    chosen = os.environ.get("TORCH_EXTENSIONS_DIR")
    return Path(chosen) if chosen else Path.home() / ".cache" / "torch_extensions"


def _build_key(architectures: str | None) -> str:
    flags = (*_CPP_FLAGS, *_CUDA_FLAGS)
    parts = (library_name(), torch.__version__, torch.version.cuda, architectures, platform.machine(), flags)
    return _digest(*(str(part).encode() for part in parts))[:16]


def _build(source: Source) -> None:
    """Compile into the library's folder, one process at a time; the others find it there."""
    assert source.library is not None
    folder = source.library.parent
    folder.mkdir(parents=True, exist_ok=True)
    # the system gives this lock back when a process dies, which torch's own lock file does not survive
    with (folder / "building").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "complete").exists():
            logger.info("building the selective-feature operators in %s", folder)
            (folder / "lock").unlink(missing_ok=True)
            _compile(source)
            (folder / "complete").touch()


def _compile(source: Source) -> None:
    from torch.utils import cpp_extension

    assert source.library is not None
    with_cuda = "cuda" in source.devices
    before = {name: os.environ.get(name) for name in ("PATH", "TORCH_CUDA_ARCH_LIST")}
    os.environ["PATH"] = f"{before['PATH'] or os.defpath}{os.pathsep}{_SCRIPTS}"
    if with_cuda:
        os.environ["TORCH_CUDA_ARCH_LIST"] = _gpu_target()[0] or ""
    try:
        cpp_extension.load(
            source.library.stem,
            [str(p) for p in _compiled(with_cuda)],
            extra_cflags=_CPP_FLAGS,
            extra_cuda_cflags=_CUDA_FLAGS,
            build_directory=str(source.library.parent),
            with_cuda=with_cuda,
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


def _compiled(with_cuda: bool) -> list[Path]:
    folders = ("cpu", "cuda") if with_cuda else ("cpu",)
    return [p for p in _files("*.c*") if p.suffix in (".cpp", ".cu") and p.parent.name in (*folders, sources().name)]


def _files(pattern: str) -> list[Path]:
    return sorted(p for p in sources().rglob(pattern) if p.suffix in (".cpp", ".cu", ".h", ".cuh"))


def _digest(*parts: bytes) -> str:
    whole = hashlib.sha256()
    for part in parts:
        whole.update(hashlib.sha256(part).digest())
    return whole.hexdigest()
