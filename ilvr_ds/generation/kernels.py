"""Whether decoding steps use Triton's kernels, and these.

They need a GPU, 16 bit and Triton. Where one is missing, and where `use_kernels(False)` said so, PyTorch computes the
same formulas.
"""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

_wanted = True


def use_kernels(wanted: bool) -> None:
    """For the whole process. What a decoder has recorded already stays as it is."""
    global _wanted
    _wanted = wanted


def can_run(inputs: Tensor) -> bool:
    """Whether kernels compute what comes of these."""
    return _wanted and inputs.is_cuda and inputs.dtype in (torch.float16, torch.bfloat16) and _has_triton()


@cache
def _has_triton() -> bool:
    return find_spec("triton") is not None


@cache
def kernel(name: str) -> Any:
    """Of kernel_texts.py."""
    import triton

    from ilvr_ds.generation import kernel_texts

    return triton.jit(getattr(kernel_texts, name))
