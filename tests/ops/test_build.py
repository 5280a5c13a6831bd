"""Which code the operators run in: prebuilt, built at first use by one process of many, or the reference, said once."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils import cpp_extension

from ilvr_ds.ops import build
from tests.ranks import ROOT

WITH_CUDA = """
import logging, torch
from torch.utils import cpp_extension
logging.basicConfig(format="%(levelname)s %(message)s")
torch.version.cuda, cpp_extension.CUDA_HOME = "13.0", "/nowhere"  # what is built has no CUDA in it
"""
LOAD = """
from ilvr_ds.ops.build import load, use_native
for _ in range(3):
    print(use_native("cuda"), load().kind)
"""
TINY = """
#include <torch/library.h>
TORCH_LIBRARY(ilvr_ds, m) { m.def("tiny() -> int", [] { return int64_t{7}; }); }
"""
LOAD_TINY = """
import sys
from pathlib import Path
from ilvr_ds.ops import build
build.sources = lambda: Path(sys.argv[1])
build.load()
print(torch.ops.ilvr_ds.tiny(), build.status().kind)
"""


def start(code: str, *arguments: str, **environment: str) -> subprocess.Popen[str]:
    """A process with a torch that says it has CUDA, as far as building goes."""
    clean = {name: value for name, value in os.environ.items() if name not in ("ILVR_OPS", "CXX")}
    clean |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "TORCH_CUDA_ARCH_LIST": "9.0"}
    return subprocess.Popen(
        [sys.executable, "-c", WITH_CUDA + code, *arguments],
        env=clean | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def compiler(path: Path, on_compile: str) -> str:
    """A c++ that runs a shell command first when it is to compile."""
    real = shutil.which("c++")
    path.write_text(f'#!/bin/sh\ncase " $* " in *" -c "*) {on_compile};; esac\nexec {real} "$@"\n')
    path.chmod(0o755)
    return str(path)


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    """A csrc that compiles in seconds."""
    (tmp_path / "csrc").mkdir()
    (tmp_path / "csrc/bindings.cpp").write_text(TINY)
    return tmp_path / "csrc"


def test_without_a_compiler_the_reference_computes_and_one_line_says_so(tmp_path: Path) -> None:
    out, err = start(LOAD, CXX="no-such-compiler", TORCH_EXTENSIONS_DIR=str(tmp_path)).communicate()
    assert out.splitlines() == ["False reference"] * 3
    assert [line for line in err.splitlines() if "WARNING" in line] == [
        "WARNING selective-feature operators run in plain PyTorch: no C++ compiler (no-such-compiler not found)"
    ]


def test_on_a_cpu_nothing_is_built(tmp_path: Path) -> None:
    code = """
from ilvr_ds.ops.selective_topk import selective_topk
print(selective_topk(torch.ones(1, 2), torch.eye(2), torch.tensor([0, 2]), 1, 0.5, 1.0)[0].tolist())
"""
    out, err = start(code, CXX="no-such-compiler", TORCH_EXTENSIONS_DIR=str(tmp_path / "cache")).communicate()
    assert out.split() == ["[[0]]"] and "WARNING" not in err
    assert not (tmp_path / "cache").exists()


def test_a_failing_compiler_is_an_error_with_its_last_words(tmp_path: Path, tiny: Path) -> None:
    broken = compiler(tmp_path / "broken", "echo out of flux capacitors >&2; exit 1")
    run = start(LOAD_TINY, str(tiny), CXX=broken, TORCH_EXTENSIONS_DIR=str(tmp_path))
    out, err = run.communicate()
    assert run.returncode != 0 and not out
    assert "BuildError" in err and "out of flux capacitors" in err.split("BuildError", 1)[1]


def test_processes_that_start_together_build_once_and_survive_a_stale_lock(tmp_path: Path, tiny: Path) -> None:
    counting = compiler(tmp_path / "counting", f"echo compiled >> {tmp_path}/log")
    environment = {"CXX": counting, "TORCH_EXTENSIONS_DIR": str(tmp_path / "cache")}
    code = "import sys; from pathlib import Path; from ilvr_ds.ops import build\n"
    code += "build.sources = lambda: Path(sys.argv[1]); print(build.status().library)"
    out, _ = start(code, str(tiny), **environment).communicate()
    folder = Path(out.strip()).parent
    assert not folder.exists()  # asking for the status builds nothing
    folder.mkdir(parents=True)
    (folder / "lock").touch()  # what torch leaves behind when a build is killed
    runs = [start(LOAD_TINY, str(tiny), **environment) for _ in range(3)]
    for run in runs:
        out, err = run.communicate(timeout=120)
        assert out.split() == ["7", "just-in-time"], err
    assert (tmp_path / "log").read_text() == "compiled\n"


def pretend_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(cpp_extension, "CUDA_HOME", "/nowhere")
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "9.0")


def pretend_package(monkeypatch: pytest.MonkeyPatch, root: Path) -> Path:
    """A package at root, not loaded, with csrc beside it. Returns its folder of operators."""
    (root / "ilvr_ds/ops").mkdir(parents=True)
    monkeypatch.setattr(build, "_HERE", root / "ilvr_ds/ops/build.py")
    monkeypatch.setattr(build, "_loaded", None)
    monkeypatch.delenv("ILVR_OPS", raising=False)
    pretend_cuda(monkeypatch)
    return root / "ilvr_ds/ops"


def test_a_prebuilt_library_counts_only_for_the_sources_it_was_built_from(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tiny: Path
) -> None:
    folder = pretend_package(monkeypatch, tmp_path)
    (folder / f"{build.library_name()}.so").touch()
    assert build.status().kind == "prebuilt"
    (tiny / "bindings.cpp").write_text(TINY.replace("7", "8"))
    assert build.status().kind == "just-in-time"


def test_sources_are_found_inside_an_installed_package(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tiny: Path
) -> None:
    pretend_package(monkeypatch, tmp_path)
    shutil.move(tiny, tmp_path / "ilvr_ds/csrc")
    assert build.sources() == tmp_path / "ilvr_ds/csrc"


def test_the_environment_can_force_or_forbid_native_code(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tiny: Path
) -> None:
    pretend_package(monkeypatch, tmp_path)
    monkeypatch.setenv("ILVR_OPS", "reference")
    assert (build.status().kind, build.status().reason) == ("reference", "ILVR_OPS=reference")
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setenv("ILVR_OPS", "native")
    with pytest.raises(build.BuildError, match="ILVR_OPS=native, but no C\\+\\+ compiler"):
        build.status()
    monkeypatch.setenv("ILVR_OPS", "fast")
    with pytest.raises(ValueError, match="ILVR_OPS=fast: expected auto, native or reference"):
        build.status()


def test_the_build_key_changes_with_gpu_architectures_and_torch(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tiny: Path
) -> None:
    pretend_package(monkeypatch, tmp_path)
    keys = {build._build_key("8.0"), build._build_key("9.0")}
    monkeypatch.setattr(torch, "__version__", "9.9")
    assert len(keys | {build._build_key("9.0")}) == 3


@pytest.mark.parametrize(
    ("cuda", "home", "message"),
    [(None, "/nowhere", "this torch has no CUDA"), ("13.0", None, r"no nvcc \(set CUDA_HOME\)")],
)
def test_native_code_needs_cuda(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tiny: Path, cuda: str | None, home: str | None, message: str
) -> None:
    pretend_package(monkeypatch, tmp_path)
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(cpp_extension, "CUDA_HOME", home)
    assert build.status().kind == "reference"
    with pytest.raises(build.BuildError, match=f"ILVR_BUILD_OPS=1, but {message}"):
        build.ahead_of_time()
    monkeypatch.setenv("ILVR_OPS", "native")
    with pytest.raises(build.BuildError, match=f"ILVR_OPS=native, but {message}"):
        build.status()


def test_every_file_that_is_compiled_ahead_of_time_exists(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_cuda(monkeypatch)
    [extension] = build.ahead_of_time()["ext_modules"]
    assert all((ROOT / source).is_file() for source in extension.sources)
    assert {"bindings.cpp", "autograd.cpp", "ops.cpp", "selective_topk.cu"} <= {
        Path(source).name for source in extension.sources
    }
