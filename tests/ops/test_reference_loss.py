"""The selective-feature loss against loops in float64."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch

from ilvr_ds.ops.reference import selective_contrastive_loss
from tests.ops import loops
from tests.ops.loops import Ragged

SIZES = [[5], [1], [4, 9, 3], [0, 6, 0, 2, 0], [12, 1, 7, 16]]
EXACT = 1e-12
"""float64 against float64: some hundred roundings of 1e-16."""


def losses(case: Ragged, temperature: float = 0.1, **options: Any) -> tuple[torch.Tensor, torch.Tensor]:
    if options.get("negatives") == "all":
        options.setdefault("sample_of_segment", case.sample_of_segment)
    return selective_contrastive_loss(
        case.prediction,
        case.candidates,
        case.target_index,
        case.segment_of_slot,
        case.offsets,
        case.selected,
        temperature,
        **options,
    )


def moved(case: Ragged, rows: slice | list[int]) -> torch.Tensor:
    """Which slots' contrastive losses change when candidates `rows` become others."""
    before = losses(case, negatives="all")[1]
    changed = dataclasses.replace(case, candidates=case.candidates.clone())
    changed.candidates[rows] = changed.candidates[rows].flip(-1)
    return losses(changed, negatives="all")[1] != before


@pytest.mark.parametrize("negatives", ["segment", "all"])
@pytest.mark.parametrize("temperature", [1.0, 0.1])
@pytest.mark.parametrize("sizes", SIZES)
def test_both_losses_equal_the_loop(sizes: list[int], temperature: float, negatives: str) -> None:
    for seed in range(5):
        case = Ragged.draw(sizes, 3, seed=seed)
        for actual, wanted in zip(
            losses(case, temperature, negatives=negatives), loops.losses(case, temperature, negatives), strict=True
        ):
            torch.testing.assert_close(actual, wanted, atol=EXACT, rtol=EXACT)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_short_precision_loses_nothing_but_the_rounding_of_the_inputs(dtype: torch.dtype) -> None:
    """Cosines are good to about 1e-6 in float32; the temperature of 0.1 makes that 1e-5 of the logits."""
    case = Ragged.draw([30, 4, 18], 6, width=40)
    case.prediction, case.candidates = case.prediction.to(dtype), case.candidates.to(dtype)
    alignment, contrastive = losses(case, negatives="all")
    assert alignment.dtype == contrastive.dtype == torch.float32
    wanted = loops.losses(case, 0.1, "all")
    torch.testing.assert_close(alignment.double(), wanted[0], atol=1e-6, rtol=0)
    torch.testing.assert_close(contrastive.double(), wanted[1], atol=1e-5, rtol=0)


def test_a_small_case_by_hand() -> None:
    """Target along x, one negative along y, prediction at 45 degrees: both cosines are equal, so the loss is log 2."""
    case = Ragged.draw([2], 1, width=2)
    case.prediction, case.candidates = torch.tensor([[1.0, 1.0]]), torch.tensor([[3.0, 0.0], [0.0, 0.5]])
    case.selected, case.target_index = torch.tensor([[0]]), torch.tensor([0])
    alignment, contrastive = losses(case)
    assert alignment.item() == pytest.approx(1 - math.sqrt(0.5), rel=1e-6)
    assert contrastive.item() == pytest.approx(math.log(2), rel=1e-6)


def test_slots_without_a_target_have_no_loss_and_no_gradient() -> None:
    case = Ragged.draw([6, 5], 4)
    case.selected = torch.tensor([[2, 0, -1, -1], [-1, -1, -1, -1]])
    case.target_index = case.selected.flatten()
    case.prediction.requires_grad_()
    alignment, contrastive = losses(case)
    (alignment.sum() + contrastive.sum()).backward()
    has_target = case.target_index >= 0
    assert (alignment[~has_target] == 0).all() and (contrastive[~has_target] == 0).all()
    assert (case.prediction.grad[~has_target] == 0).all() and (case.prediction.grad[has_target] != 0).any(1).all()


def test_without_negatives_the_contrastive_loss_is_exactly_zero() -> None:
    """All rows selected: rounding must not leave a crumb, in value or gradient."""
    case = Ragged.draw([3], 3)
    case.selected, case.target_index = torch.tensor([[1, 2, 0]]), torch.tensor([1, 2, 0])
    case.candidates, case.prediction = case.candidates.float(), case.prediction.float().requires_grad_()
    alignment, contrastive = losses(case)
    contrastive.sum().backward()
    assert contrastive.tolist() == [0, 0, 0] and (alignment != 0).all()
    assert (case.prediction.grad == 0).all()


def test_selected_rows_of_the_segment_are_neither_positives_nor_negatives() -> None:
    case = Ragged.draw([8], 3)
    case.selected, case.target_index = torch.tensor([[4, 1, 6]]), torch.tensor([4, -1, -1])
    assert not moved(case, [1, 6]).any()
    assert moved(case, [4])[0] and moved(case, [0])[0]


def test_all_negatives_are_those_of_other_samples_but_not_of_other_segments_of_the_same() -> None:
    """Segments 0 and 2 belong to one sample, 1 to another; selected rows of the other sample count as negatives."""
    case = Ragged.draw([4, 5, 6], 1)
    case.selected = torch.tensor([[0], [4], [9]])
    case.target_index, case.sample_of_segment = case.selected.flatten(), torch.tensor([0, 1, 0])
    assert moved(case, slice(9, 15)).tolist() == [False, True, True]
    assert moved(case, slice(1, 4)).tolist() == [True, True, False]
    assert moved(case, [4]).tolist() == [True, True, True]


def test_segment_negatives_ignore_other_samples() -> None:
    case = Ragged.draw([4, 5], 2)
    alone = dataclasses.replace(
        Ragged.draw([4], 2),
        candidates=case.candidates[:4],
        prediction=case.prediction[:2],
        selected=case.selected[:1],
        target_index=case.target_index[:2],
    )
    torch.testing.assert_close(losses(case)[1][:2], losses(alone)[1], atol=EXACT, rtol=EXACT)


def test_all_negatives_need_to_know_the_samples() -> None:
    with pytest.raises(ValueError, match="sample_of_segment"):
        losses(Ragged.draw([3], 1), negatives="all", sample_of_segment=None)


def test_noise_is_added_to_the_targets_and_to_nothing_else() -> None:
    case = Ragged.draw([5, 7], 3)
    noise = torch.randn(case.prediction.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    wanted = loops.losses(case, 0.1, "all", noise)
    for actual, expected in zip(losses(case, noise=noise, negatives="all"), wanted, strict=True):
        torch.testing.assert_close(actual, expected, atol=EXACT, rtol=EXACT)


def test_noise_survives_targets_of_short_precision() -> None:
    """Noise of 0.01 on bf16 features of size 4 is half their spacing: added in bf16 it would be lost or doubled."""
    case = Ragged.draw([3], 1, width=8)
    case.candidates, case.prediction = (4 * case.candidates).bfloat16(), case.prediction.float()
    case.selected, case.target_index = torch.tensor([[1]]), torch.tensor([1])
    noise = torch.full((1, 8), 0.007)
    wanted = loops.losses(case, 0.1, noise=noise.double())[0]
    torch.testing.assert_close(losses(case, noise=noise)[0].double(), wanted, atol=1e-6, rtol=0)


@pytest.mark.parametrize("negatives", ["segment", "all"])
def test_gradients_equal_finite_differences(negatives: str) -> None:
    case = Ragged.draw([4, 3, 0, 5], 2, width=4)
    case.prediction.requires_grad_()
    assert torch.autograd.gradcheck(
        lambda z: losses(dataclasses.replace(case, prediction=z), 0.5, negatives=negatives), case.prediction
    )


def test_candidates_get_no_gradient() -> None:
    case = Ragged.draw([6], 3)
    case.selected, case.target_index = torch.tensor([[4, 1, 2]]), torch.tensor([4, 1, 2])
    case.prediction.requires_grad_()
    case.candidates.requires_grad_()
    alignment, contrastive = losses(case)
    (alignment.sum() + contrastive.sum()).backward()
    assert case.candidates.grad is None and case.prediction.grad is not None


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_zero_prediction_has_cosine_zero_and_no_gradient(dtype: torch.dtype) -> None:
    case = Ragged.draw([6], 2)
    case.selected, case.target_index = torch.tensor([[4, 1]]), torch.tensor([4, 1])
    case.candidates = case.candidates.to(dtype)
    case.prediction = torch.zeros(2, 7, dtype=dtype, requires_grad=True)
    alignment, contrastive = losses(case)
    (alignment.sum() + contrastive.sum()).backward()
    assert alignment.tolist() == [1, 1]
    assert contrastive.tolist() == pytest.approx([math.log(5)] * 2, rel=1e-6)  # one positive, four negatives, all alike
    assert (case.prediction.grad == 0).all()


def test_zero_candidates_are_orthogonal_to_everything() -> None:
    case = Ragged.draw([5], 2)
    case.selected, case.target_index = torch.tensor([[0, 1]]), torch.tensor([0, 1])
    case.candidates[[0, 3]] = 0
    case.prediction.requires_grad_()
    alignment, contrastive = losses(case)
    (alignment.sum() + contrastive.sum()).backward()
    torch.testing.assert_close(contrastive.detach(), loops.losses(case, 0.1)[1], atol=EXACT, rtol=EXACT)
    assert alignment[0] == 1 and case.prediction.grad.isfinite().all()


@pytest.mark.parametrize("sizes", [[], [0, 0], [4]])
def test_no_slots_no_candidates_or_no_segments_still_reach_the_prediction(sizes: list[int]) -> None:
    """The empty case must stay on the graph: every rank calls backward."""
    k = 0 if sizes == [4] else 2
    case = Ragged.draw(sizes, k)
    case.prediction.requires_grad_()
    alignment, contrastive = losses(case, negatives="all")
    assert alignment.shape == contrastive.shape == (len(sizes) * k,)
    (alignment.sum() + contrastive.sum()).backward()
    assert case.prediction.grad.shape == case.prediction.shape and (case.prediction.grad == 0).all()
