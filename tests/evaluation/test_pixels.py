from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest

from ilvr_ds.data.sample import Sample
from ilvr_ds.evaluation.pixels import replay_cost
from ilvr_ds.generation.answers import Answer
from ilvr_ds.generation.decoder import Decoder
from ilvr_ds.model.vision import VisionTower
from tests.data.packing import image_bytes

if TYPE_CHECKING:
    from ilvr_ds.generation.loading import Reasoner


@pytest.mark.parametrize("has_decoder", [False, True])
def test_each_way_has_its_tokens_and_its_time(
    latent_reasoner: Reasoner, has_decoder: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three segments and two helper images, the first of which comes again. Catches a picture that is not read, or read
    by one row alone."""
    reasoner = replace(latent_reasoner, decoder=Decoder(latent_reasoner)) if has_decoder else latent_reasoner
    special = reasoner.special
    segment = [special.latent_start, *[special.latent_pad] * 3, special.latent_end]
    answer = Answer("s", "", [5, *segment, 6, *segment, 7, 8, *segment, 9], (3, 3, 3), hit_limit=True)
    pictures = (image_bytes(size=(56, 56)), image_bytes(size=(84, 56)))
    sample = Sample("s", "How many?", (), (image_bytes(size=(56, 56)),), helper_images=pictures)
    images: list[int] = []
    tower = VisionTower.forward

    def noting(self: VisionTower, batch: Any) -> Any:
        images.append(len(batch.cu_seqlens) - 1)
        return tower(self, batch)

    monkeypatch.setattr(VisionTower, "forward", noting)
    cost = replay_cost(reasoner, sample, answer, rows=2)
    read = (4 + 2) + (6 + 2) + (4 + 2)
    assert {way: cost[way]["tokens"] for way in ("latents", "pixels", "drawn")} == {
        "latents": 20,
        "pixels": 5 + read,
        "drawn": 5 + 2 * (56 * 56 // 256 + 1) + (84 * 56 // 256 + 1),
    }
    for way in ("latents", "pixels", "drawn"):
        assert cost[way]["seconds"] > 0 and cost[way]["seconds_in_batch"] > 0
    assert cost["rows"] == 2
    assert images.count(2) >= 3, "all rows read each picture"
