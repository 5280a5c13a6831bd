"""A window as one piece of memory: the same values, in another process, pinned, on a device."""

from __future__ import annotations

import pickle
import resource
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from ilvr_ds.data.loader import WindowDataset, iterate_windows
from ilvr_ds.data.parcel import ALIGNMENT, OPEN_FILES, Parcel, allow_open_files
from ilvr_ds.data.reader import ShardReader
from ilvr_ds.data.shards import open_dataset
from ilvr_ds.data.tensor_tree import _together
from ilvr_ds.data.window import Window
from tests.data.handmade import leaves
from tests.data.packing import make_dataset
from tests.golden_set import GoldenSet

MICRO_BATCHES = 16


class OneByOne:
    """Micro-batches of one sample. Picklable."""

    def __call__(self, step: int) -> list[np.ndarray]:
        return [np.array([number]) for number in range(MICRO_BATCHES)]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory, golden: GoldenSet) -> WindowDataset:
    folder = tmp_path_factory.mktemp("parcel") / "set"
    make_dataset(folder, MICRO_BATCHES)
    return WindowDataset(ShardReader(open_dataset(folder)), golden.encoder, golden.collator("packed"), OneByOne())


@pytest.fixture(scope="module")
def window(dataset: WindowDataset) -> Window:
    return dataset[0]


def assert_same(made: Window, expected: Window) -> None:
    pairs = list(zip(leaves(made), leaves(expected), strict=True))
    assert len(pairs) > 300
    for (name, a), (other, b) in pairs:
        assert (name, a.dtype, a.shape) == (other, b.dtype, b.shape)
        assert torch.equal(a, b), name
    assert made.ids == expected.ids and made.num_tokens == expected.num_tokens
    assert made.context.rounds == expected.context.rounds


def pieces(window: Window) -> set[int]:
    """The pieces of memory in which there is anything."""
    return {tensor.untyped_storage().data_ptr() for _, tensor in leaves(window) if tensor.numel()}


def test_what_comes_out_is_what_went_in(window: Window) -> None:
    opened = Parcel.of(window).open()
    assert_same(opened, window)
    assert len(pieces(opened)) == 1 < len(pieces(window))
    starts = [tensor.storage_offset() * tensor.element_size() for _, tensor in leaves(opened)]
    assert all(start % ALIGNMENT == 0 for start in starts)


def test_bytes_of_floats_survive(window: Window) -> None:
    """Stored features are bf16, with bits that no comparison of numbers sees (NaN, -0)."""
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int16)
    features = bits.view(torch.bfloat16).view(-1, 64)
    opened = pickle.loads(pickle.dumps(Parcel.of(replace(window, features=features)))).open()
    assert opened.features is not None
    assert torch.equal(opened.features.view(torch.int16).flatten(), bits)


@pytest.mark.parametrize("is_parcel", [True, False])
def test_what_shares_memory_is_moved_at_once(window: Window, is_parcel: bool) -> None:
    """Catches hundreds of small copies to a device, and views that lose their place, shape or order."""
    source = Parcel.of(window).open() if is_parcel else window
    moves = 0

    def copy(memory: torch.Tensor) -> torch.Tensor:
        nonlocal moves
        moves += 1
        return memory.clone()

    moved = source.map(_together(copy), host_too=True)
    assert_same(moved, source)
    assert (moves == 1) == is_parcel
    assert not pieces(moved) & pieces(source)


def test_windows_come_from_workers_with_few_open_files(dataset: WindowDataset, window: Window) -> None:
    """Catches a file descriptor for each of a window's hundreds of tensors: `ulimit -n 1024` ended such runs."""

    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    highest = max(int(entry.name) for entry in Path("/proc/self/fd").iterdir())
    resource.setrlimit(resource.RLIMIT_NOFILE, (highest + 100, limits[1]))
    try:
        made = list(iterate_windows(dataset, range(4), num_workers=2, pin_memory=False))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    for other in made:
        assert_same(other, window)


def test_the_limit_of_open_files_is_raised_as_far_as_it_may() -> None:
    program = (
        "import resource as r; from ilvr_ds.data.parcel import allow_open_files as allow; "
        "r.setrlimit(r.RLIMIT_NOFILE, (256, 700)); allow(); print(r.getrlimit(r.RLIMIT_NOFILE)); "
        "r.setrlimit(r.RLIMIT_NOFILE, (700, 700)); allow(); print(r.getrlimit(r.RLIMIT_NOFILE))"
    )
    made = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert made.stdout.split("\n")[:2] == ["(700, 700)", "(700, 700)"]
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    allow_open_files()
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    assert hard == before[1] and soft >= min(hard, OPEN_FILES)
    resource.setrlimit(resource.RLIMIT_NOFILE, before)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_pinned_window_is_the_same_on_a_gpu(dataset: WindowDataset, window: Window) -> None:
    """Through the loader's pinning thread: one pinned piece, one piece on the device; what stays on the host stays."""
    [made] = iterate_windows(dataset, [0], num_workers=2, pin_memory=True)
    assert all(tensor.is_pinned() for _, tensor in leaves(made) if tensor.numel())
    moved = made.to(torch.device("cuda", 0))
    assert moved.images[0].cu_seqlens.device.type == "cpu"
    on_device = [tensor for _, tensor in leaves(moved) if tensor.device.type == "cuda"]
    assert len({tensor.untyped_storage().data_ptr() for tensor in on_device}) == 1
    assert_same(moved.map(torch.Tensor.cpu, host_too=True), window)
