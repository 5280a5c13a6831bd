"""The selective-feature loss: against loops on every device, native code against the reference in float64 on a GPU."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import pytest
import torch
from torch import Tensor

from ilvr_ds.ops import reference
from ilvr_ds.ops.selective_contrastive import selective_contrastive_loss
from tests.ops import loops
from tests.ops.loops import Ragged
from tests.ops.native import DEVICES, DTYPES, GPU, assert_as_good, error, native_operators, needs_gpu, poisoned_memory

__all__ = ["native_operators"]
NEGATIVES = ["segment", "all"]


@dataclasses.dataclass
class Case:
    """Arguments of the loss on a device, and what the losses' gradients are."""

    arguments: dict[str, Any]
    grads: Tensor

    @staticmethod
    def draw(
        sizes: list[int], k: int, width: int, device: str, dtype: torch.dtype, negatives: str, temperature: float = 0.1,
        seed: int = 0,
    ) -> Case:  # fmt: skip
        case = Ragged.draw(sizes, k, width, seed)
        generator = torch.Generator().manual_seed(seed)
        arguments = {
            "prediction": case.prediction.to(device, dtype),
            "candidates": case.candidates.to(device, dtype),
            "target_index": case.target_index.to(device),
            "segment_of_slot": case.segment_of_slot.to(device),
            "candidate_offsets": case.offsets.to(device),
            "selected": case.selected.to(device),
            "temperature": temperature,
            "negatives": negatives,
            "sample_of_segment": case.sample_of_segment.to(device),
            "noise": (0.01 * torch.randn(case.prediction.shape, generator=generator)).to(device),
        }
        return Case(arguments, torch.randn(2, len(case.prediction), generator=generator).to(device))

    def results(self, loss: Any = selective_contrastive_loss, wide: bool = False) -> list[Tensor]:
        """alignment, contrastive, and the prediction's gradient; `wide` computes in float64."""
        arguments = dict(self.arguments)
        for name in ("prediction", "candidates", "noise"):
            arguments[name] = arguments[name].double() if wide and arguments[name] is not None else arguments[name]
        prediction = arguments["prediction"] = arguments["prediction"].clone().requires_grad_()
        alignment, contrastive = loss(**arguments)
        total = (alignment * self.grads[0] + contrastive * self.grads[1]).sum()
        return [alignment.detach(), contrastive.detach(), *torch.autograd.grad(total, prediction)]


SMALL = [([5], 3, 7), ([1], 2, 16), ([0, 6, 0, 2, 0], 3, 1)]
LARGE = [([300, 1, 77, 130], 20, 333), ([140] * 12, 8, 64), ([500, 0, 1], 12, 1001)]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("negatives", NEGATIVES)
@pytest.mark.parametrize(("sizes", "k", "width"), SMALL)
def test_the_losses_are_those_of_the_loop(sizes: list[int], k: int, width: int, negatives: str, device: str) -> None:
    for seed in range(4):
        case = Ragged.draw(sizes, k, width, seed)
        given = Case.draw(sizes, k, width, device, torch.float32, negatives, seed=seed)
        wanted = loops.losses(case, 0.1, negatives, given.arguments["noise"].cpu())
        for actual, truth in zip(given.results(), wanted, strict=False):
            # float32: cosines to about 1e-7, over a temperature of 0.1
            torch.testing.assert_close(actual.cpu().double(), truth, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("device", GPU)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("negatives", NEGATIVES)
@pytest.mark.parametrize("temperature", [1.0, 0.01])
@pytest.mark.parametrize(("sizes", "k", "width"), LARGE)
def test_values_and_gradients_are_as_good_as_pytorchs_own(
    sizes: list[int], k: int, width: int, temperature: float, negatives: str, dtype: torch.dtype, device: str
) -> None:
    case = Case.draw(sizes, k, width, device, dtype, negatives, temperature, seed=torch.seed() % 2**32)
    truth, theirs = (case.results(reference.selective_contrastive_loss, wide=wide) for wide in (True, False))
    # where PyTorch is lucky: two roundings of a cosine, times the slope of the logits; and one of the gradient's type
    cosine, logit = 2.0**-22, 2.0**-22 / temperature
    floors = (cosine, logit, max(logit, torch.finfo(dtype).eps / 2))
    for ours, own, right, floor in zip(case.results(), theirs, truth, floors, strict=True):
        assert_as_good(ours, own, right, floor)


@pytest.mark.parametrize("negatives", NEGATIVES)
def test_the_gradient_passes_gradcheck_in_float64(negatives: str) -> None:
    arguments = Case.draw([4, 9, 3], 2, 5, "cpu", torch.float64, negatives).arguments
    prediction = arguments.pop("prediction").requires_grad_()
    assert torch.autograd.gradcheck(lambda z: selective_contrastive_loss(z, **arguments), prediction)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("negatives", NEGATIVES)
def test_zero_rows_have_cosine_0_and_no_gradient(negatives: str, dtype: torch.dtype, device: str) -> None:
    case = Case.draw([20, 9], 4, 40, device, dtype, negatives)
    case.arguments["noise"] = None
    case.arguments["prediction"][1] = 0
    case.arguments["candidates"][::2] = 0
    actual = case.results()
    assert actual[2][1].eq(0).all()
    truth = case.results(reference.selective_contrastive_loss, wide=True)
    for ours, right, bound in zip(actual, truth, (1e-5, 1e-5, 1e-5 + torch.finfo(dtype).eps), strict=True):
        assert error(ours, right) < bound


@pytest.mark.parametrize("device", GPU)
@pytest.mark.parametrize("negatives", NEGATIVES)
def test_slots_may_come_in_any_order_and_foreign_segments_select_nothing(negatives: str, device: str) -> None:
    case = Case.draw([150, 9, 140, 200], 5, 24, device, torch.float32, negatives)
    order = torch.randperm(15, generator=torch.Generator().manual_seed(0)).to(device)  # of the first three segments
    for name in ("prediction", "target_index", "segment_of_slot", "noise"):
        case.arguments[name] = case.arguments[name][order]
    case.arguments["selected"] = case.arguments["selected"][:3]
    case.grads = case.grads[:, order]
    for ours, truth in zip(case.results(), case.results(reference.selective_contrastive_loss, wide=True), strict=True):
        assert error(ours, truth) < 1e-5


@pytest.mark.parametrize("device", DEVICES)
def test_slots_candidates_and_segments_may_be_absent(device: str) -> None:
    for sizes, k in (([], 2), ([0, 0], 2), ([3], 0)):
        alignment, contrastive, grad = Case.draw(sizes, k, 5, device, torch.float32, "all").results()
        assert alignment.shape == contrastive.shape == (len(sizes) * k,)
        assert not alignment.any() and not contrastive.any() and not grad.any()


@pytest.mark.parametrize("device", GPU)
@pytest.mark.parametrize("dtype", DTYPES)
def test_more_candidates_than_one_chunk_of_weights(dtype: torch.dtype, device: str) -> None:
    case = Case.draw([140_000, 500], 3, 8, device, dtype, "all")
    truth = case.results(reference.selective_contrastive_loss, wide=True)
    for ours, right, bound in zip(case.results(), truth, (1e-6, 1e-6, torch.finfo(dtype).eps + 1e-5), strict=True):
        assert error(ours, right) < bound


@pytest.mark.parametrize("device", GPU)
@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_may_begin_anywhere_in_memory(dtype: torch.dtype, device: str) -> None:
    case = Case.draw([70, 20], 4, 64, device, dtype, "all")
    wanted = case.results()
    for name in ("prediction", "candidates"):
        given = case.arguments[name]
        case.arguments[name] = (
            torch.empty(given.numel() + 1, device=device, dtype=dtype)[1:].view_as(given).copy_(given)
        )
    for a, b in zip(case.results(), wanted, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=2 * torch.finfo(b.dtype).eps)


@pytest.mark.parametrize("device", GPU)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("negatives", NEGATIVES)
def test_every_number_is_written_and_runs_repeat_bit_by_bit(negatives: str, dtype: torch.dtype, device: str) -> None:
    case = Case.draw([300, 0, 1, 77], 20, 72, device, dtype, negatives)
    wanted = case.results()
    with poisoned_memory():
        actual = case.results()
    assert all(torch.equal(a, b) for a, b in zip(actual, wanted, strict=True))


@pytest.mark.parametrize("device", GPU)
def test_the_matrix_of_similarities_is_never_in_memory(device: str) -> None:
    case = Case.draw([20_000], 400, 8, device, torch.float32, "segment")
    similarities = 400 * 20_000 * 4
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    case.results()
    assert torch.cuda.max_memory_allocated() - before < similarities


@pytest.mark.parametrize("device", GPU)
@pytest.mark.parametrize("negatives", NEGATIVES)
def test_the_operators_are_well_behaved(negatives: str, device: str) -> None:
    case = Case.draw([30, 2], 3, 24, device, torch.float32, negatives)
    sample_of_segment = case.arguments["sample_of_segment"] if negatives == "all" else None
    first = ("prediction", "candidates", "target_index", "segment_of_slot", "candidate_offsets", "selected")
    arguments = [*(case.arguments[name] for name in first), 0.1, sample_of_segment, case.arguments["noise"]]
    arguments[0] = arguments[0].requires_grad_()
    torch.library.opcheck(torch.ops.ilvr_ds.selective_contrastive.default, arguments)
    *_, slots, rows = torch.ops.ilvr_ds.selective_contrastive(*arguments)
    arguments[0] = arguments[0].detach()
    backward = [*case.grads, *arguments[:5], 0.1, sample_of_segment, case.arguments["noise"], slots.detach(), rows]
    torch.library.opcheck(torch.ops.ilvr_ds.selective_contrastive_backward.default, backward)


@pytest.mark.parametrize("device", GPU)
def test_it_compiles_without_a_break_and_with_its_gradient(device: str) -> None:
    case = Case.draw([30, 2], 3, 24, device, torch.bfloat16, "all")
    compiled = torch.compile(selective_contrastive_loss, fullgraph=True, backend="aot_eager")
    for actual, wanted in zip(case.results(compiled), case.results(), strict=True):
        assert torch.equal(actual, wanted)


@needs_gpu
@pytest.mark.parametrize("negatives", NEGATIVES)
def test_it_can_be_captured_and_never_waits_for_the_gpu(negatives: str) -> None:
    case = Case.draw([300, 2, 40], 20, 256, "cuda", torch.bfloat16, negatives)
    wanted, drawn = case.results(), case.arguments["candidates"]
    case.arguments["candidates"] = static = drawn.flip(0)
    graph = torch.cuda.CUDAGraph()
    torch.cuda.set_sync_debug_mode("error")
    try:
        case.results()
        with torch.cuda.graph(graph):
            captured = case.results()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    static.copy_(drawn)
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(captured, wanted, strict=True))


GOOD = Case.draw([4, 5], 2, 3, "cpu", torch.float32, "all").arguments


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"candidates": GOOD["candidates"].bfloat16()}, TypeError, "candidates [9, 3] is torch.bfloat16: expected f"),
        ({"candidates": torch.ones(9, 4)}, ValueError, "candidates has shape [9, 4]: expected [N, D] with D = 3"),
        ({"target_index": torch.zeros(3).long()}, ValueError, "target_index has shape [3]: expected [S] with S = 4"),
        ({"target_index": torch.tensor([0, 1, 2, 9])}, IndexError, "target_index [4] holds 0 to 9: expected -1 to 8"),
        ({"selected": torch.tensor([[-2, 0]])}, IndexError, "selected [1, 2] holds -2 to 0: expected -1 to 8"),
        ({"segment_of_slot": torch.tensor([0, 0, 1, 2])}, IndexError, "segment_of_slot [4] holds 0 to 2: expected 0"),
        ({"candidate_offsets": torch.tensor([0, 12, 9])}, ValueError, "candidate_offsets [3] = [0, 12, 9]: expected"),
        ({"noise": torch.zeros(4, 2)}, ValueError, "noise has shape [4, 2]: expected [S, D] with S = 4, D = 3"),
        ({"sample_of_segment": None}, ValueError, 'negatives "all" needs sample_of_segment'),
        ({"negatives": "none"}, ValueError, "negatives = 'none': expected \"segment\" or \"all\""),
    ],
)  # fmt: skip
def test_bad_input_is_named(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=re.escape(message)):
        selective_contrastive_loss(**(GOOD | changes))
