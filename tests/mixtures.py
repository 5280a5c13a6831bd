"""Three packed data sets of the demo, two with held-out data, and the overrides that mix them."""

from __future__ import annotations

from pathlib import Path

from ilvr_ds.cli import main
from tests.recipes import RECIPE

SIZES = {"big": 40, "middle": 16, "small": 8}
CUTS = {"big/train": (0, 40), "middle/train": (36, 52), "small/train": (52, 60)}
"""Lines of the demo's training data; `big` and `middle` share ids."""
HELD_OUT = {"big/held_out": (0, 8), "small/held_out": (8, 16)}


def pack_sets(demo: Path, folder: Path) -> Path:
    """Pack them below `folder`."""
    for split, cuts in (("train", CUTS), ("held_out", HELD_OUT)):
        lines = (demo / f"task/{split}.jsonl").read_text().splitlines(keepends=True)
        for name, (first, last) in cuts.items():
            source = folder / f"{name.replace('/', '-')}.jsonl"
            source.write_text("".join(lines[first:last]))
            words = ["pack", "--input", str(source), "--image-root", str(demo / "task"), "--output", str(folder / name)]
            assert main([*words, "--config", RECIPE, "--set", f"model.path={demo / 'model'}"]) == 0
    return folder


def shards(folder: Path, big: str = "weight: 2", middle: str = "weight: 1", small: str = "weight: 1.5") -> str:
    """The override of `data.shards`."""
    return (
        f"data.shards=[{{path: {folder}/big/train, name: big, {big}, eval_shards: {folder}/big/held_out}}, "
        f"{{path: {folder}/middle/train, name: middle, {middle}}}, "
        f"{{path: {folder}/small/train, name: small, {small}, eval_shards: {folder}/small/held_out}}]"
    )
