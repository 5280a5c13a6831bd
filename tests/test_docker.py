"""What can be known of the Dockerfile where nothing builds it."""

from __future__ import annotations

import json
import re
import shlex
from fnmatch import fnmatch
from functools import cache

import pytest

from tests.ranks import ROOT

PAGE = (ROOT / "docs/docker.md").read_text()
INSTRUCTIONS = {"FROM", "RUN", "ENV", "WORKDIR", "COPY", "ARG", "USER", "ENTRYPOINT", "CMD"}


@cache
def instructions() -> tuple[tuple[str, str], ...]:
    """Instruction and arguments, without comments, continued lines joined."""
    text = re.sub(r"^#.*\n", "", (ROOT / "Dockerfile").read_text(), flags=re.M).replace("\\\n", " ")
    found = [line.split(maxsplit=1) for line in text.splitlines() if line.strip()]
    return tuple((name, " ".join(rest.split())) for name, rest in found)


def arguments(name: str) -> list[str]:
    return [rest for instruction, rest in instructions() if instruction == name]


def copied() -> list[str]:
    return [source for rest in arguments("COPY") for source in shlex.split(rest)[:-1]]


def environment() -> dict[str, str]:
    return dict(pair.split("=", 1) for rest in arguments("ENV") for pair in shlex.split(rest))


def pinned() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    return dict(line.partition(";")[0].strip().split("==") for line in lines if "==" in line.partition(";")[0])


def test_it_is_read_as_docker_reads_it() -> None:
    """ADD would take addresses, too; a carriage return ends up in commands."""
    assert {name for name, _ in instructions()} == INSTRUCTIONS
    for file in ("Dockerfile", ".dockerignore"):
        data = (ROOT / file).read_bytes()
        assert b"\r" not in data and data.endswith(b"\n") and not re.search(rb"[ \t]\n", data)


def test_everything_that_is_copied_exists_and_is_sent() -> None:
    """Catches a folder that .dockerignore withholds, and one that setup.py needs and nobody copies."""
    sent = [line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")]
    assert sorted(copied()) == sorted(sent)
    assert [name for name in sent if not (ROOT / name).exists()] == []
    needed = set(re.findall(r'root / "([\w.]+)', (ROOT / "setup.py").read_text()))
    inside = set(re.findall(r'"ilvr_ds\.\w+": "(\w+)', (ROOT / "setup.py").read_text()))
    assert needed | inside and needed | inside <= set(copied())


def test_nothing_else_is_sent() -> None:
    lines = (ROOT / ".dockerignore").read_text().splitlines()
    assert lines[1] == "*", "first everything is withheld"
    assert {"**/__pycache__", "**/*.so"} <= set(lines), "and within what is sent, what was built here"


def test_its_versions_are_ours() -> None:
    """One CUDA for nvcc and torch, torch and Python that setup.py takes, and every install bound by constraints.txt."""
    [base] = arguments("FROM")
    cuda = re.fullmatch(r"nvidia/cuda:(\d+)\.(\d+)\.\d+-devel-ubuntu24\.04", base)
    runs = " && ".join(arguments("RUN"))
    index = re.search(r"--index-url https://download\.pytorch\.org/whl/cu(\d+) torch\b", runs)
    assert cuda and index and index[1] == cuda[1] + cuda[2]
    setup = (ROOT / "setup.py").read_text()
    least = re.search(r'"torch>=([\d.]+)"', setup)
    assert least and numbers(least[1]) <= numbers(pinned()["torch"])
    installs = re.findall(r"pip install ([^&;]*)", runs)
    assert len(installs) == 5 and all("-c constraints.txt" in line or "--upgrade pip" in line for line in installs)
    flash = re.search(r'"(flash-attn[^"]*)"', setup)
    assert flash and f"'{flash[1]}'" in runs
    extras = set(re.findall(r"'\.\[([\w,]+)\]'", runs)[0].split(","))
    assert extras <= set(re.findall(r'^        "(\w+)": \[', setup, re.M))


def numbers(version: str) -> tuple[int, ...]:
    return tuple(map(int, version.split(".")))


@pytest.mark.parametrize("tool", ["pdsh", "openssh-client", "build-essential", "python3-dev", "git"])
def test_what_the_launchers_and_the_compiler_need_is_there(tool: str) -> None:
    """ninja comes by pip."""
    [install] = [rest for rest in arguments("RUN") if "apt-get install" in rest]
    assert tool in install.split() and "rm -rf /var/lib/apt/lists" in install and "ninja" in pinned()


def test_it_runs_as_a_user_who_can_write_the_caches() -> None:
    order = [name for name, _ in instructions()]
    assert arguments("USER") == ["ilvr"] and order.index("USER") > max(i for i, n in enumerate(order) if n == "RUN")
    made = next(rest for rest in arguments("RUN") if "useradd" in rest)
    assert "install -d -o ilvr -g ilvr /cache /project" in made and arguments("WORKDIR")[-1] == "/project"
    caches = [environment()[name] for name in ("TORCH_EXTENSIONS_DIR", "HF_HOME", "TRITON_CACHE_DIR")]
    assert all(fnmatch(place, "/cache/*") for place in caches)


def test_it_is_the_command() -> None:
    assert json.loads(arguments("ENTRYPOINT")[0]) == ["ilvr-ds"] and "ilvr-ds=" in (ROOT / "setup.py").read_text()
    assert environment()["PATH"].startswith("/opt/venv/bin:")


def test_the_page_names_what_the_image_has() -> None:
    """Its build arguments, folders and launcher."""
    for name in [*re.findall(r"--build-arg (\w+)", PAGE), "FLASH_ATTN"]:
        assert any(rest.startswith(f"{name}=") for rest in arguments("ARG"))
    assert set(re.findall(r'-v "?[\w$.-]+:(/\w+)', PAGE)) == {"/project", "/cache"}
    [checkout] = [rest for rest in arguments("WORKDIR") if rest.startswith("/opt")]
    launched = re.findall(rf"{checkout}/([\w/.]+\.sh)", PAGE)
    assert launched and all((ROOT / path).is_file() and path.split("/")[0] in copied() for path in launched)
