"""The notebook docs/tour.ipynb: what can be read, and, as a drill, from top to bottom."""

from __future__ import annotations

import json
import os
import re
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from tests.ranks import ROOT
from tests.test_docs import MAX_LINE, bad_commands, leads_nowhere

NOTEBOOK = ROOT / "docs/tour.ipynb"


@cache
def cells() -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(NOTEBOOK.read_text())["cells"]
    return found


def texts(kind: str) -> list[str]:
    return ["".join(cell["source"]) for cell in cells() if cell["cell_type"] == kind]


def test_it_is_kept_without_outputs() -> None:
    """What a run leaves behind would change with every run."""
    assert all(not cell["outputs"] and cell["execution_count"] is None for cell in cells() if "outputs" in cell)
    assert "/" not in json.dumps(json.loads(NOTEBOOK.read_text())["metadata"]), "no path of the machine that wrote it"


def test_its_links_and_commands_exist() -> None:
    words, code = "\n".join(texts("markdown")), "\n".join(texts("code"))
    targets = re.findall(r"\]\(([^)\s]+)\)", words)
    assert targets and [target for target in targets if leads_nowhere(target, NOTEBOOK)] == []
    joined = re.sub(r'"\n +f?"', "", code)
    assert sorted(set(bad_commands(f"{joined}\n" + "\n".join(re.findall("`([^`]+)`", words))))) == []
    assert max(map(len, f"{words}\n{code}".splitlines())) <= MAX_LINE


def test_its_first_code_is_what_a_reader_sets() -> None:
    assert texts("code")[0].startswith('MODEL = ""')


def test_what_is_seen_is_told_from_what_it_means() -> None:
    """Each part that shows results says both."""
    shown = [text for text in (" ".join(text.split()) for text in texts("markdown")) if "**You see**" in text]
    assert len(shown) >= 6 and all("**It does not mean**" in text for text in shown)


@pytest.mark.drill
@pytest.mark.timeout(900)
def test_it_runs_from_top_to_bottom(tmp_path: Path) -> None:
    """In a folder of its own; what the reader is told to see is there."""
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    place = {"metadata": {"path": str(tmp_path)}}
    nbclient.NotebookClient(notebook, timeout=600, kernel_name="python3", resources=place).execute(
        env={**os.environ, "PYTHONPATH": f"{ROOT}"}
    )
    said = [_said(cell) for cell in notebook.cells if cell.cell_type == "code"]
    everything = "\n".join(said)
    assert "step 10/10" in everything and "finished; record and checkpoints" in everything
    assert sum(text.count("<image/png>") for text in said) == 3, "the task, the selection, the latents"
    assert "latent steps of each segment: (1, 1, 1)" in everything
    assert "**used**: The latents are used" in _after(said, "ilvr-ds audit")
    assert "before: 32 of 32 right - after ten steps: 32 of 32 right" in said[-1]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["tour-files"], "nothing beside its own folder"


def _said(cell: Any) -> str:
    """A code cell's printed text, texts shown and the kinds of pictures."""
    parts = []
    for output in cell.outputs:
        parts.append(output.get("text", ""))
        shown = output.get("data", {})
        parts += [shown.get("text/plain", ""), shown.get("text/markdown", "")]
        parts += [f"<{kind}>" for kind in shown if kind.startswith("image/")]
    return "\n".join(parts)


def _after(said: list[str], command: str) -> str:
    """What the cell said that ran a command."""
    [text] = [text for text in said if f"$ {command} " in text]
    return text
