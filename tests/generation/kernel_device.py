"""Where tests run Triton's kernels: on a GPU, or in Triton's interpreter where TRITON_INTERPRET is set."""

from __future__ import annotations

import os
from importlib.util import find_spec

import pytest
import torch

KERNEL_DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
_CAN_RUN = find_spec("triton") and (torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") == "1")
needs_kernels = pytest.mark.skipif(not _CAN_RUN, reason="needs Triton, and a GPU or TRITON_INTERPRET=1")

ROUNDED = 2**-8 if torch.cuda.is_available() else 2**-7
"""How far bf16 is off, of a number: the interpreter cuts off where a GPU rounds to the nearest"""
