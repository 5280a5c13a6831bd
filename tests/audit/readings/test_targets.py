from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from ilvr_ds.audit.readings.similarity import similarity
from ilvr_ds.audit.readings.targets import Chosen, TargetChooser, targets_alone
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


def test_where_change_alone_decides_no_model_is_asked(golden: GoldenSet, reasoner: Reasoner) -> None:
    """The same targets as with one, in every picture that differs from the one before; none in the others."""
    by_change = SelectionConfig(pool="changed", by="change", group_size=golden.selection.group_size)
    chooser = TargetChooser(reasoner, replace(by_change, unchanged="none"))
    assert chooser.teacher is None
    found = [rows for chosen in chooser(golden.samples) for rows in chosen.rows]
    wanted = [rows for chosen in TargetChooser(reasoner, by_change)(golden.samples) for rows in chosen.rows]
    assert any(found) and all(wanted)
    assert [a for a in found if a] == [b for a, b in zip(found, wanted, strict=True) if a]


def test_targets_alone_are_compared_across_samples() -> None:
    """Slots without a target hold the pad embedding, in all samples the same: with pool changed most slots may be
    empty, and targets that differ would look alike."""
    filler = torch.full((4,), 0.5)
    samples = [Chosen((torch.eye(4, dtype=torch.bfloat16),), ((place,),)).latents(8, filler) for place in range(3)]
    assert [len(segment) for fed in samples for segment in fed] == [8, 8, 8]
    found = similarity([targets_alone(fed, filler) for fed in samples])
    assert found["cosine_across_samples"] == 0.0 and found["cosine_across_slots"] is None and found["vectors"] == 3
    assert similarity([targets_alone([filler.expand(2, -1)], filler)])["vectors"] == 0


def test_samples_without_helper_images_or_regions_have_no_targets(golden: GoldenSet, reasoner: Reasoner) -> None:
    bare = replace(golden.samples[0], helper_images=(), steps=())
    chosen = TargetChooser(reasoner, golden.selection)([bare, golden.samples[0], bare])
    assert [bool(found.candidates) for found in chosen] == [False, True, False]
    assert not TargetChooser(reasoner, SelectionConfig(pool="region"))([golden.samples[0]])[0].candidates
