from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from ilvr_ds.audit.readings.targets import TargetChooser
from ilvr_ds.config import SelectionConfig

if TYPE_CHECKING:
    from ilvr_ds.generation.loading import Reasoner
    from tests.golden_set import GoldenSet


def test_the_model_as_its_own_teacher_picks_the_golden_targets(golden: GoldenSet, reasoner: Reasoner) -> None:
    """Teacher and student have the same weights there, as in an audit."""
    chosen = TargetChooser(reasoner, golden.selection)(golden.samples)
    K, filler = reasoner.latent_size, torch.full((reasoner.model.config.text_config.hidden_size,), 7.0)
    for sample, found in zip(golden.samples, chosen, strict=True):
        assert len(found.rows) == len(sample.helper_images) == len(found.candidates)
        fed = found.latents(K, filler)
        for m, rows in enumerate(found.rows):
            assert list(rows) == golden.expected[f"{sample.id}.selected.{m}"].tolist()
            assert torch.equal(fed[m][: len(rows)], found.candidates[m][list(rows)])
            assert torch.equal(fed[m][len(rows) :], filler.expand(K - len(rows), -1))


def test_samples_without_helper_images_or_regions_have_no_targets(golden: GoldenSet, reasoner: Reasoner) -> None:
    bare = replace(golden.samples[0], helper_images=(), steps=())
    chosen = TargetChooser(reasoner, golden.selection)([bare, golden.samples[0], bare])
    assert [bool(found.candidates) for found in chosen] == [False, True, False]
    assert not TargetChooser(reasoner, SelectionConfig(pool="region"))([golden.samples[0]])[0].candidates
