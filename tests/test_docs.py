"""What the pages name exists: files, tests, commands and options, make targets, recipe keys, functions, links."""

from __future__ import annotations

import ast
import io
import re
from collections.abc import Iterator
from contextlib import redirect_stdout
from functools import cache
from pathlib import Path

import pytest

from ilvr_ds.cli import main
from ilvr_ds.config import Recipe

ROOT = Path(__file__).parents[1]
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *ROOT.glob("docs/*.md"), *ROOT.glob("launch/*.md")])
LOG = ROOT / "docs/log.md"
"""Its entries are dated: what they name may be gone."""
CURRENT = [page for page in PAGES if page != LOG]
PLACES = ["", "ilvr_ds", "tests", "ds_configs", "launch/recipes", "launch", "launch/slurm"]
"""Where a path in the text may begin."""
ENDINGS = {".py", ".md", ".yaml", ".sh", ".sbatch", ".cpp", ".cu", ".png", ".txt", ".example"}
FOLDER = re.compile(r"(?:ilvr_ds|docs|tests|launch|csrc|ds_configs)/[\w./-]*")
TEST = re.compile(r"(?P<file>[\w/]*test_\w+\.py)?::(?P<name>test_\w+)(?P<dots>\.\.\.)?")
COMMAND = re.compile(r"(?:ilvr-ds|-m ilvr_ds\.cli) +(?P<name>[a-z][a-z-]+)\b(?P<rest>[^\n`|#]*)")
KEY = re.compile(r"(?<![\w/.])(?P<section>[a-z]+)\.(?P<key>[a-z][a-z0-9_]+)(?![\w/.(])")
MAX_LINE = 120

by_page = pytest.mark.parametrize("page", CURRENT, ids=lambda page: page.name)


def blocks(text: str) -> str:
    """Fenced and indented blocks."""
    fenced = re.findall(r"^```.*?\n(.*?)^```", text, re.M | re.S)
    return "\n".join([*fenced, *re.findall(r"^ {4}.*$", text, re.M)])


def without_fences(text: str) -> str:
    """The text without fenced blocks."""
    return re.sub(r"^```.*?^```", "", text, flags=re.M | re.S)


def spans(text: str) -> list[str]:
    """Inline code; a span may go over the end of a line."""
    return [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", without_fences(text))]


def code(page: Path) -> str:
    """All code of a page, spans and blocks."""
    text = page.read_text()
    return "\n".join([*spans(text), blocks(text)])


def missing_paths(page: Path) -> Iterator[str]:
    """Paths in code that lead nowhere. Of a path with a placeholder in capitals (RUN/lock.json) nothing is known."""
    for span in spans(page.read_text()):
        for word in re.findall(r"[\w./:*-]+", span):
            path = word.partition(":")[0].rstrip(".")
            is_path = Path(path).suffix in ENDINGS or FOLDER.fullmatch(path) or re.fullmatch(r"zero\d\w*\.json", path)
            is_placeholder = re.search(r"\b[A-Z]+\b", path) or "*" in path or path.startswith(("/", ".", "outputs"))
            is_readme = path.endswith(("README.md", "CHANGELOG.md", "CONTRIBUTING.md"))
            if is_path and (is_readme or not is_placeholder) and not exists(path, page):
                yield path


def exists(path: str, page: Path) -> bool:
    """Whether a path exists where it may begin; a bare module name may lie in any room."""
    if any((ROOT / place / path).exists() for place in PLACES) or (page.parent / path).exists():
        return True
    return path.endswith(".py") and "/" not in path and any((ROOT / "ilvr_ds").rglob(path))


GENERATED = {"a.png", "train.jsonl", "hosts", "settings.txt", "mine/records.py", "mine/ask.py"}
"""Names of a user's files."""


@by_page
def test_every_path_exists(page: Path) -> None:
    assert sorted(set(missing_paths(page)) - GENERATED) == []


@cache
def functions_of(file: Path) -> frozenset[str]:
    """Names of the functions of a test file."""
    return frozenset(node.name for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.FunctionDef))


@by_page
def test_every_test_exists(page: Path) -> None:
    """`file::test_name`; a name may be cut short by dots, and a second `::test_name` is of the file before."""
    missing, file = [], ""
    for span in spans(page.read_text()):
        if re.fullmatch(r"[\w/]*test_\w+\.py", span):
            file = span
        for found in TEST.finditer(span):
            file = found["file"] or file
            names = functions_of(ROOT / "tests" / file) if (ROOT / "tests" / file).is_file() else frozenset()
            if not any(name.startswith(found["name"]) if found["dots"] else name == found["name"] for name in names):
                missing.append(f"{file}::{found['name']}")
    assert missing == []


@cache
def help_of(*command: str) -> str:
    said = io.StringIO()
    with redirect_stdout(said), pytest.raises(SystemExit):
        main([*command, "--help"])
    return said.getvalue()


def bad_commands(text: str) -> Iterator[str]:
    """Subcommands and options of `ilvr-ds` that it does not have."""
    known = re.findall(r"^    ([a-z][a-z-]+)", help_of(), re.M)
    for found in COMMAND.finditer(text):
        if found["name"] not in known:
            yield found["name"]
            continue
        options = re.findall(r"(?<![\w-])--[a-z][a-z-]*", found["rest"].partition(" && ")[0])
        yield from (
            f"{found['name']} {name}" for name in options if not re.search(rf"{name}\b(?!-)", help_of(found["name"]))
        )


@by_page
def test_every_command_exists(page: Path) -> None:
    assert sorted(set(bad_commands(code(page)))) == []


@by_page
def test_every_module_that_is_run_exists(page: Path) -> None:
    modules = re.findall(r"-m ((?:ilvr_ds|tests)(?:\.\w+)+)", code(page))
    files = {name: ROOT / name.replace(".", "/") for name in modules}
    assert [name for name, at in files.items() if not (at.with_suffix(".py").is_file() or at.is_dir())] == []


@by_page
def test_every_make_target_exists(page: Path) -> None:
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.M)
    named = re.findall(r"^(?:ILVR_\w+=\w+ )?make ((?:[a-z-]+ ?)+)", code(page), re.M)
    assert [word for words in named for word in words.split() if word not in targets] == []


@by_page
def test_every_recipe_key_exists(page: Path) -> None:
    sections = Recipe().to_dict()
    named = {(found["section"], found["key"]) for span in spans(page.read_text()) for found in KEY.finditer(span)}
    files = {"py", "yaml", "json", "md", "jsonl", "sbatch"}
    missing = [f"{s}.{k}" for s, k in sorted(named) if s in sections and k not in sections[s] and k not in files]
    assert missing == []


@cache
def definitions() -> frozenset[str]:
    """`function`, `Class` and `Class.method` of the package."""
    names = set()
    for file in (ROOT / "ilvr_ds").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                names.add(node.name)
            if isinstance(node, ast.ClassDef):
                names |= {f"{node.name}.{part.name}" for part in node.body if isinstance(part, ast.FunctionDef)}
    return frozenset(names)


@pytest.mark.parametrize("name", ["README.md", "docs/architecture.md", "docs/design.md", "docs/differences.md"])
def test_every_function_exists(name: str) -> None:
    """On these pages `name()` is a function or method of this package, and in architecture.md `Name` a class."""
    text = (ROOT / name).read_text()
    named = set(re.findall(r"`((?:\w+\.)?\w+)\(\)`", text))
    if name == "docs/architecture.md":
        named |= set(re.findall(r"`([A-Z][a-z]\w+)`", text))
    assert sorted(named - definitions()) == []


def slug(heading: str) -> str:
    """The anchor that GitHub gives a heading."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


def leads_nowhere(target: str, page: Path) -> bool:
    """Whether a relative link has no file, or its file no such heading."""
    path, _, anchor = target.partition("#")
    file = (page.parent / path).resolve() if path else page
    if not file.exists() or not anchor:
        return not file.exists()
    return anchor not in {slug(line) for line in re.findall(r"^#+ (.*)$", file.read_text(), re.M)}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_resolves(page: Path) -> None:
    targets = re.findall(r"\]\(([^)\s]+)\)", page.read_text())
    assert [target for target in targets if "://" not in target and leads_nowhere(target, page)] == []


def test_the_index_has_every_page() -> None:
    """Catches a page that nobody finds."""
    listed = re.findall(r"^- \[[^]]+\]\(([^)]+)\): ", (ROOT / "docs/README.md").read_text(), re.M)
    pages = {path.name for path in (ROOT / "docs").iterdir() if path.suffix in {".md", ".ipynb"}} - {"README.md"}
    assert pages == {target for target in listed if "/" not in target} and len(listed) == len(set(listed))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_lines_are_wrapped(page: Path) -> None:
    """But for tables and code."""
    text = without_fences(page.read_text())
    assert [line for line in text.splitlines() if len(line) > MAX_LINE and not line.startswith(("|", "    "))] == []


@by_page
def test_a_page_begins_with_what_it_is_for(page: Path) -> None:
    title, _, rest = page.read_text().partition("\n")
    assert title.startswith("# ")
    assert re.match(r"\n*[A-Z`]", rest), "a sentence stands below the title, before any heading, table or code"


def test_the_checks_find_what_is_missing(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        "# P\n`training/engine.py`, `data/plan.py`, `RUN/lock.json`, `README.md`, `ilvr_ds/nowhere/`, `zero9.json`\n"
    )
    assert list(missing_paths(page)) == ["training/engine.py", "ilvr_ds/nowhere/", "zero9.json"]
    lines = "ilvr-ds pack --input a --nothing\nilvr-ds unpack\nilvr-ds train --config a --set b=c\n"
    assert list(bad_commands(lines)) == ["pack --nothing", "unpack"]
