from __future__ import annotations

from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
import torch

from ilvr_ds.generation import room
from ilvr_ds.generation.decoder import Decoder

if TYPE_CHECKING:
    from ilvr_ds.generation.loading import Reasoner


def test_keys_and_values_are_planned_as_they_are_taken(reasoner: Reasoner) -> None:
    decoder = Decoder(reasoner)
    decoder.reserve(3, 300)
    assert sum(held.nbytes for held in decoder.held) == decoder.bytes_of(3, decoder.columns) > 0
    more = room.bytes_of_answers(decoder, 6, 300) - room.bytes_of_answers(decoder, 3, 300)
    assert more > decoder.bytes_of(3, 512), "rows have more than keys and values"
    assert room.bytes_of_weights(decoder) > sum(p.nbytes for p in reasoner.model.parameters())


@pytest.mark.parametrize("rows", [1, 8, 256])
def test_as_many_rows_as_fit_are_a_power_of_two(reasoner: Reasoner, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = Decoder(reasoner)
    needed = room.bytes_of_weights(decoder) + room.bytes_of_answers(decoder, rows, 500)
    memory: Any = SimpleNamespace(total_memory=needed / (1 - room._SPARE) + 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: memory)
    assert room.rows_that_fit(decoder, 500) == rows
