"""Imports go one way, and DeepSpeed, MLflow, torch.distributed and FastAPI each have one door."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "ilvr_ds"
BASE = {"", "errors"}
"""Allowed everywhere: the package itself (its version) and the errors."""
MAY_IMPORT = {
    "": {"api"},
    "errors": set(),
    "config": BASE | {"config"},
    "shipped": BASE,
    "launcher": BASE,
    "dist": BASE | {"launcher"},
    "base_model": BASE | {"dist", "model"},
    "addresses": set(),
    "ctrl_c": set(),
    "file_modes": BASE,
    "whole_files": BASE,
    "owner": BASE,
    "unfinished": BASE | {"owner", "whole_files"},
    "ops": {"ops"},
    "data": BASE | {"data", "config", "whole_files", "unfinished"},
    "ingest": BASE | {"ingest", "data"},
    "model": BASE | {"model", "data", "config"},
    "distill": BASE | {"distill", "model", "ops", "data", "config"},
    "monitoring": BASE | {"monitoring", "planning", "model", "data", "dist", "owner"},
    "tracking": BASE | {"tracking", "data", "whole_files", "addresses", "ctrl_c"},
    "checkpoint": BASE | {"checkpoint", "monitoring", "distill", "config", "dist", "file_modes", "whole_files"},
    "engine": BASE | {"engine", "checkpoint", "distill", "model", "config", "dist", "shipped"},
    "training": BASE
    | {
        "training",
        "engine",
        "checkpoint",
        "tracking",
        "monitoring",
        "distill",
        "model",
        "ops",
        "data",
        "config",
        "dist",
    }
    | {"base_model", "provenance", "pictures", "planning", "evaluation", "generation", "whole_files"},
    "generation": BASE | {"generation", "model", "ops", "data", "config", "dist"},
    "evaluation": BASE
    | {"evaluation", "generation", "checkpoint", "tracking", "monitoring", "model", "data", "config", "dist"}
    | {"base_model", "provenance", "pictures", "file_modes", "whole_files", "unfinished"},
    "audit": BASE
    | {"audit", "evaluation", "distill", "tracking", "monitoring", "model", "data", "config", "dist", "pictures"}
    | {"whole_files", "generation"},
    "serving": BASE | {"serving", "evaluation", "generation", "ingest", "data", "whole_files", "addresses", "ctrl_c"},
    "planning": BASE | {"planning", "model", "config", "whole_files"},
    "provenance": BASE,
    "pictures": BASE | {"pictures", "whole_files"},
    "api": BASE | {"evaluation", "generation", "audit", "pictures", "ingest", "data", "dist"},
    "doctor": BASE | {"ops", "data", "provenance"},
    "cluster": BASE | {"doctor", "dist", "ops", "data", "provenance"},
    "demo": BASE | {"demo", "data", "model", "file_modes"},
    "cli": BASE
    | {"cli", "config", "data", "ingest", "model", "engine", "training", "tracking", "evaluation", "audit"}
    | {"generation", "serving", "pictures", "planning", "dist", "launcher", "demo", "doctor", "cluster", "shipped"},
}
DOORS = {
    "deepspeed": ("engine/", "checkpoint/"),
    "mlflow": ("tracking/",),
    "torch.distributed": ("dist.py", "monitoring/watchdog.py"),
    "fastapi": ("serving/",),
    "starlette": ("serving/",),
    "uvicorn": ("serving/",),
}
FILES = sorted(path.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("*.py"))


def room_of(module: str) -> str:
    """ "data" of "ilvr_ds.data.plan"; "" of "ilvr_ds" itself."""
    return f"{module}..".split(".")[1]


def imported(tree: ast.AST, file: str) -> Iterator[str]:
    """Dotted names that a file imports, or reaches as attributes; `from a import b` gives a.b."""
    package = ["ilvr_ds", *file.split("/")[:-1]]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) + 1 - node.level] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            yield from (f"{module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Attribute):
            yield ast.unparse(node)


def violations(file: str, source: str) -> list[str]:
    """What breaks the rules in a file of the package."""
    found = []
    room = room_of(f"ilvr_ds.{file.removesuffix('.py').replace('/', '.')}".removesuffix(".__init__"))
    for name in imported(ast.parse(source), file):
        if name.split(".")[0] == "ilvr_ds":
            other = room_of(name)
            other = other if other in MAY_IMPORT else ""  # ilvr_ds.__version__
            if other not in MAY_IMPORT[room]:
                found.append(f"{file}: imports {name}")
        for library, doors in DOORS.items():
            if f"{name}.".startswith(f"{library}.") and not file.startswith(doors):
                found.append(f"{file}: imports {name}")
    return found


def asked_families(source: str) -> list[str]:
    """Comparisons with a family's name: what differs between families is in their modules."""
    names = ("qwen2_5_vl", "qwen3_vl")
    return [
        f"{node.lineno}: {part.value}"
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Compare)
        for part in ast.walk(node)
        if isinstance(part, ast.Constant) and isinstance(part.value, str) and part.value.startswith(names)
    ]


@pytest.mark.parametrize("file", [file for file in FILES if not file.startswith("model/families/")])
def test_no_module_asks_for_a_family_by_name(file: str) -> None:
    assert asked_families((PACKAGE / file).read_text()) == []


def test_a_question_for_a_family_is_found() -> None:
    source = 'def f(c):\n    return 1 if c.model_type == "qwen3_vl" else c in ("a", "qwen2_5_vl_text")\n'
    assert asked_families(source) == ["2: qwen3_vl", "2: qwen2_5_vl_text"]


@pytest.mark.parametrize("file", FILES)
def test_every_file_imports_only_what_it_may(file: str) -> None:
    assert violations(file, (PACKAGE / file).read_text()) == []


def test_every_room_has_a_rule() -> None:
    assert {file.split("/")[0].removesuffix(".py") for file in FILES} == set(MAY_IMPORT) - {""} | {"__init__"}


@pytest.mark.parametrize(
    ("file", "source"),
    [
        ("data/plan.py", "from ilvr_ds.model.student import load_config"),
        ("data/plan.py", "from ilvr_ds import dist"),
        ("demo/task/spec.py", "import ilvr_ds.training.run"),
        ("data/plan.py", "from ..model import student"),
        ("data/plan.py", "from .. import dist"),
        ("errors.py", "from . import config"),
        ("config/sections.py", "from ilvr_ds.data.sample import Sample"),
        ("ops/noise.py", "from ilvr_ds.errors import UserError"),
        ("data/describe.py", "def f():\n    from ilvr_ds.distill import query"),
        ("distill/query.py", "from ilvr_ds.training.stage1 import StageOneStep"),
        ("training/run.py", "from ilvr_ds.cli import main"),
        ("training/trainer.py", "import deepspeed"),
        ("training/trainer.py", "from deepspeed.ops import adam as a"),
        ("distill/teacher.py", "if True:\n    import mlflow.entities as e"),
        ("distill/ema.py", "import torch.distributed as torch_dist"),
        ("distill/ema.py", "from torch import distributed"),
        ("cli/serve.py", "def f():\n    import uvicorn"),
        ("generation/generate.py", "from fastapi.responses import JSONResponse"),
        ("distill/ema.py", "import torch\ntorch.distributed.barrier()"),
    ],
)
def test_the_check_finds_a_violation(file: str, source: str) -> None:
    assert len(set(violations(file, source))) >= 1


@pytest.mark.parametrize(
    ("file", "source"),
    [
        ("data/writer.py", "import ilvr_ds\nilvr_ds.__version__"),
        ("data/plan.py", "from .sample import Sample\nfrom ilvr_ds.config import Recipe"),
        ("dist.py", "import torch.distributed as torch_dist"),
        ("engine/networks.py", "import deepspeed\nfrom ilvr_ds import dist"),
        ("tracking/mlflow_copy.py", "def f():\n    from mlflow import MlflowClient"),
        ("model/student.py", "import deepspeedlike"),
    ],
)
def test_the_check_lets_what_is_allowed_pass(file: str, source: str) -> None:
    assert violations(file, source) == []


HOT = [
    "ops/noise.py", "ops/reference.py", "distill/query.py", "distill/selection.py", "distill/stage1.py",
    "distill/stage2.py", "distill/text.py", "distill/teacher.py", "model/rollout.py",
    "model/layers/cached_attention.py",
    "training/stage1.py", "training/stage2.py", "model/injection.py", "model/vision.py", "model/layers/attention.py",
    "training/step.py",
    "distill/pool.py", "distill/similarity.py", "ops/change.py",
]  # fmt: skip
WAITING = {"item", "tolist", "numpy", "cpu", "nonzero", "tensor", "as_tensor", "from_numpy", "masked_select", "unique"}


def waiting_calls(source: str) -> list[str]:
    """Calls that wait for a GPU: what reads a value, and tensors made from Python numbers; __init__ may have them."""
    found = []
    for function in ast.walk(ast.parse(source)):
        if isinstance(function, ast.FunctionDef) and function.name != "__init__":
            for node in ast.walk(function):
                if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in WAITING:
                    found.append(f"{node.lineno}: {node.func.attr}")
    return found


@pytest.mark.parametrize("file", HOT)
def test_nothing_between_batch_and_optimizer_step_waits_for_the_gpu(file: str) -> None:
    """What can be seen without a GPU; `make bench` asks torch on one."""
    assert waiting_calls((PACKAGE / file).read_text()) == []


def test_waiting_calls_are_seen() -> None:
    source = "def f(x):\n    y = torch.tensor([1, 2], device=x.device)\n    return x.item()\n"
    assert waiting_calls(source) == ["2: tensor", "3: item"]
