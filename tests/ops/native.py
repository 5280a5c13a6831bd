"""What the tests of native operators share: devices, the rule for errors, a way to run a check with poisoned memory."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

from ilvr_ds.ops.build import load

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
GPU = [pytest.param("cuda", marks=needs_gpu)]
"""For tests that compare native code with the reference, which on a CPU would be compared with itself."""
DEVICES = ["cpu", *GPU]


@pytest.fixture(autouse=True, scope="session")
def native_operators() -> None:
    """Fails where a GPU is and the operators could not be built: the reference would be compared with itself."""
    assert not torch.cuda.is_available() or load().kind != "reference"


def error(actual: Tensor, truth: Tensor) -> float:
    """Relative to the whole, as a norm; NaN never passes."""
    truth = truth.detach().cpu()
    return float((actual.detach().cpu().double() - truth).norm() / truth.norm().clamp(min=1e-30))


def assert_as_good(actual: Tensor, same_dtype: Tensor, truth: Tensor, floor: float = 2.0**-23) -> None:
    """The kernel against PyTorch's own computation; `floor` is one rounding, where PyTorch happens to be exact."""
    assert error(actual, truth) <= 2 * max(error(same_dtype, truth), floor)


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """New tensors hold NaN, or the largest integer."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)
