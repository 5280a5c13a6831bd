"""VSP spatial planning: the actions of an answer run on the sample's map."""

from __future__ import annotations

import json
import re
from typing import Literal

from ilvr_ds.data.answer_place import last_boxed
from ilvr_ds.data.sample import SampleError
from ilvr_ds.evaluation.scoring import clean

Outcome = Literal["success", "hole", "not_reached"]
Map = list[list[int]]

START, GOAL, HOLE = 1, 2, -1
_MOVES = {"L": (0, -1), "R": (0, 1), "U": (-1, 0), "D": (1, 0)}
_WORD = re.compile(r"LEFT|RIGHT|UP|DOWN|[LRUD]")
_BETWEEN = re.compile(r"[\s,;\-–>→()\[\]{}'\"]*")


def read_map(meta: dict[str, str]) -> Map:
    """The map of a sample's `map_desc`; raises SampleError where it is missing or is not a map."""
    if "map_desc" not in meta:
        raise SampleError("it has no map_desc")
    try:
        rows = json.loads(meta["map_desc"])
        cells = [cell for row in rows for cell in row]
        whole = len({len(row) for row in rows}) == 1 and set(cells) <= {START, GOAL, HOLE, 0}
    except (ValueError, TypeError) as error:
        raise SampleError(f"its map_desc is not a map ({error})") from error
    if not whole or cells.count(START) != 1 or cells.count(GOAL) != 1:
        raise SampleError("its map_desc is not a map with one start and one goal")
    return [[int(cell) for cell in row] for row in rows]


def read_actions(response: str) -> list[str]:
    r"""The moves L, R, U, D in the last `\boxed{...}`, written as letters or words; [] where they cannot be read."""
    text = clean(last_boxed(response) or "").upper()
    if _BETWEEN.sub("", _WORD.sub("", text)):
        return []
    return [word[0] for word in _WORD.findall(text)]


def run_actions(grid: Map, actions: list[str]) -> Outcome:
    """What happens: a move off the edge is no move, a hole ends in defeat, the goal in success."""
    row, column = next((r, c) for r, cells in enumerate(grid) for c, cell in enumerate(cells) if cell == START)
    for action in actions:
        down, right = _MOVES[action]
        if 0 <= row + down < len(grid) and 0 <= column + right < len(grid[0]):
            row, column = row + down, column + right
        if grid[row][column] == HOLE:
            return "hole"
        if grid[row][column] == GOAL:
            return "success"
    return "not_reached"
