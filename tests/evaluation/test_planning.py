from __future__ import annotations

import pytest

from ilvr_ds.data.sample import SampleError
from ilvr_ds.evaluation.planning import Outcome, read_actions, read_map, run_actions

GRID = [[2, -1, 0], [0, 0, 0], [0, 1, -1]]


@pytest.mark.parametrize(
    ("actions", "outcome"),
    [
        ("ULU", "success"),
        ("LUU", "success"),
        ("DDULU", "success"),  # off the edge is no move
        ("UU", "hole"),
        ("R", "hole"),
        ("UUL", "hole"),  # nothing counts after a hole
        ("LUUD", "success"),  # and nothing after the goal
        ("U", "not_reached"),
        ("", "not_reached"),
    ],
)
def test_actions_run_on_the_map(actions: str, outcome: Outcome) -> None:
    assert run_actions(GRID, list(actions)) == outcome


@pytest.mark.parametrize(
    ("response", "actions"),
    [
        (r"\boxed{U,L,U}", "ULU"),
        (r"\boxed{ULU}", "ULU"),
        (r"\boxed{UP, left -> \text{Up}}", "ULU"),
        (r"\boxed{R} no: \boxed{U → L → U}", "ULU"),
        (r"\boxed{[\'U\', \'L\']}".replace("\\'", "'"), "UL"),
        (r"U, L, U", ""),
        (r"\boxed{}", ""),
        (r"\boxed{I would go up}", ""),
        ("", ""),
    ],
)
def test_actions_are_read_from_the_last_box(response: str, actions: str) -> None:
    assert "".join(read_actions(response)) == actions


@pytest.mark.parametrize("text", [None, "[[1, 0]]", "[[1, 2], [0]]", "7", "[[1, 2, 5]]", "no", "[[1, 1, 2]]", "[]"])
def test_a_map_must_be_one(text: str | None) -> None:
    with pytest.raises(SampleError, match="map_desc"):
        read_map({} if text is None else {"map_desc": text})


def test_a_map_is_read_as_the_importer_keeps_it() -> None:
    assert read_map({"map_desc": "[[2, -1, 1], [0, 0, 0]]"}) == [[2, -1, 1], [0, 0, 0]]
