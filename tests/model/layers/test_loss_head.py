from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils._python_dispatch import TorchDispatchMode

from ilvr_ds.model.layers.loss_head import LossHead, use_loss_head
from ilvr_ds.model.student import load_student
from tests.golden_set import GoldenSet

V, D = 97, 6


def head_of(dtype: torch.dtype, sums_in_fp32: bool = True) -> LossHead:
    torch.manual_seed(0)
    model = nn.Module()
    model.lm_head = nn.Linear(D, V, bias=False, dtype=dtype)
    weight = model.lm_head.weight
    use_loss_head(model, sums_in_fp32)
    head = model.lm_head
    assert isinstance(head, LossHead) and head.weight is weight and list(model.state_dict()) == ["lm_head.weight"]
    return head


def test_it_stands_where_the_stock_model_has_its_head(golden: GoldenSet) -> None:
    """Catches a head that transformers renames, gives a bias, or no longer calls on its way to the logits."""
    model = load_student(golden.model, torch.float32, 0)
    names, head = list(model.state_dict()), model.get_output_embeddings()
    moved = "transformers' head is no longer what model/layers/loss_head.py takes the place of"
    assert type(head) is nn.Linear and head.bias is None, moved
    ids = torch.arange(5)[None]
    with torch.no_grad():
        wanted = model(input_ids=ids).logits
        use_loss_head(model)
        assert torch.equal(model(input_ids=ids).logits, wanted)
    assert isinstance(model.get_output_embeddings(), LossHead), moved
    assert list(model.state_dict()) == names and model.lm_head is model.get_output_embeddings()


def gradients(losses: Tensor, hidden: Tensor, weight: Tensor) -> list[Tensor]:
    scale = torch.linspace(0.5, 2, len(losses))
    return list(torch.autograd.grad((losses * scale).sum(), [hidden, weight]))


@pytest.mark.parametrize("rows", [0, 1, 12, 13])
@pytest.mark.parametrize("chunk", [1, 4, 1024])
def test_chunks_equal_the_whole(rows: int, chunk: int) -> None:
    """Losses, predictions and both gradients, with weights of the losses that differ."""
    head = head_of(torch.float64)
    hidden = torch.randn(rows, D, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(V, (rows,))
    logits = head(hidden).float()
    expected = cross_entropy(logits, labels, reduction="none")
    losses, best = head(hidden, labels, chunk)
    torch.testing.assert_close(losses, expected)
    assert torch.equal(best, logits.argmax(-1)) and not best.requires_grad
    torch.testing.assert_close(gradients(losses, hidden, head.weight), gradients(expected, hidden, head.weight))


def test_one_chunk_in_bf16_is_torchs_own() -> None:
    head = head_of(torch.bfloat16)
    hidden = torch.randn(12, D, dtype=torch.bfloat16, requires_grad=True)
    labels = torch.randint(V, (12,))
    expected = cross_entropy(head(hidden).float(), labels, reduction="none")
    losses, _ = head(hidden, labels, 12)
    assert torch.equal(losses, expected)
    torch.testing.assert_close(gradients(losses, hidden, head.weight), gradients(expected, hidden, head.weight))


@pytest.mark.parametrize(("in_fp32", "least", "most"), [(True, 0.0, 0.004), (False, 0.01, 1.0)])
def test_many_chunks_in_bf16_are_added_up_in_float32(in_fp32: bool, least: float, most: float) -> None:
    """A product of bf16 and the sum are each rounded once, 2^-9 at most; in bf16 every further chunk is rounded."""
    head = head_of(torch.bfloat16, in_fp32)
    hidden = (torch.randn(512, D) + 1).to(torch.bfloat16).requires_grad_()
    labels = torch.randint(V, (512,))
    wide = head.weight.detach().double().requires_grad_()
    expected = cross_entropy(hidden.detach().double() @ wide.T, labels, reduction="none")
    (exact,) = torch.autograd.grad(expected.sum(), [wide])
    (grad,) = torch.autograd.grad(head(hidden, labels, 1)[0].sum(), [head.weight])
    assert grad.dtype == torch.bfloat16
    assert least < float((grad.double() - exact).norm() / exact.norm()) < most


def test_a_frozen_head_gets_no_gradient() -> None:
    head = head_of(torch.float32).requires_grad_(False)
    hidden = torch.randn(3, D, requires_grad=True)
    head(hidden, torch.randint(V, (3,)), 2)[0].sum().backward()
    assert hidden.grad is not None and head.weight.grad is None


class Largest(TorchDispatchMode):
    """Rows of the largest tensor with a column for each entry of the vocabulary."""

    rows = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple) else (result,):
            if isinstance(tensor, Tensor) and tensor.dim() == 2 and tensor.shape[1] == V:
                self.rows = max(self.rows, len(tensor))
        return result


def test_no_more_than_a_chunk_of_logits_is_held() -> None:
    head = head_of(torch.float32)
    hidden = torch.randn(50, D, requires_grad=True)
    with Largest() as largest:
        head(hidden, torch.randint(V, (50,)), 7)[0].sum().backward()
    assert largest.rows == 7
