"""Windows from a packed data set: their order, going on, worker processes, samples that do not fit."""

from __future__ import annotations

import multiprocessing
import pickle
import signal
import subprocess
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch

from ilvr_ds.data.loader import PlannedNumbers, SequentialNumbers, WindowDataset, WindowLoader, iterate_windows
from ilvr_ds.data.plan import SamplePlan
from ilvr_ds.data.reader import ShardReader
from ilvr_ds.data.shards import open_dataset
from ilvr_ds.data.template import SampleEncoder
from ilvr_ds.data.window import Window
from ilvr_ds.errors import UserError
from tests.data.handmade import leaves
from tests.data.packing import make_dataset, make_sample, write_shards
from tests.golden_set import GoldenSet

SAMPLES, GLOBAL_BATCH = 14, 4  # 3 steps an epoch, 2 samples left out
IDENTITY = {"data": "0123abcd", "run.seed": 5, "data.lanes": 2}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("loader") / "set"
    make_dataset(folder, SAMPLES, per_shard=5)
    return folder


@pytest.fixture(scope="module")
def plan(folder: Path) -> SamplePlan:
    return SamplePlan(open_dataset(folder).shard_sizes, seed=5, lanes=2, global_batch=GLOBAL_BATCH)


@pytest.fixture(scope="module")
def dataset(folder: Path, plan: SamplePlan, golden: GoldenSet) -> WindowDataset:
    return dataset_of(folder, golden, PlannedNumbers(plan, rank=0, world=1, micro_batch_size=2))


def dataset_of(folder: Path, golden: GoldenSet, numbers_of: Any) -> WindowDataset:
    return WindowDataset(ShardReader(open_dataset(folder)), golden.encoder, golden.collator("right"), numbers_of)


def loader_of(dataset: WindowDataset, plan: SamplePlan, **identity: Any) -> WindowLoader:
    return WindowLoader(dataset, plan, {**IDENTITY, **identity}, num_workers=0, pin_memory=False)


def ids(window: Window) -> list[str]:
    return [name for batch in window.micro_batches for name in batch.ids]


def same(a: Window, b: Window) -> bool:
    """All tensors and all names are equal."""
    pairs = list(zip(leaves(a), leaves(b), strict=True))
    return ids(a) == ids(b) and all(n == m and torch.equal(x, y) for (n, x), (m, y) in pairs)


@pytest.fixture(scope="module")
def windows(dataset: WindowDataset, plan: SamplePlan) -> list[Window]:
    """Of five steps, over the end of the first epoch, without interruption."""
    return [window for _, window in loader_of(dataset, plan).windows(5)]


def test_each_step_has_the_samples_of_the_plan(windows: list[Window], plan: SamplePlan) -> None:
    assert [ids(window) for window in windows] == [
        [f"sample-{number}" for number in plan.samples(step, rank=0, world=1)] for step in range(5)
    ]


def test_noise_is_keyed_by_the_number_in_the_data_set(windows: list[Window], plan: SamplePlan) -> None:
    keys = [key for batch in windows[2].micro_batches for key in batch.noise_keys.tolist()]
    assert sorted(keys) == sorted([int(number), 0] for number in plan.samples(2, rank=0, world=1))


def test_steps_are_counted_from_the_current_one(dataset: WindowDataset, plan: SamplePlan) -> None:
    loader = loader_of(dataset, plan)
    assert [step for step, _ in loader.windows(2)] == [0, 1]
    assert [step for step, _ in loader.windows(4)] == [2, 3]
    assert list(loader.windows(4)) == []


@pytest.mark.parametrize("stop", [1, 3, 4])
def test_going_on_gives_the_windows_that_were_left(
    stop: int, dataset: WindowDataset, plan: SamplePlan, windows: list[Window]
) -> None:
    first = loader_of(dataset, plan)
    for _ in first.windows(stop):
        pass
    second = loader_of(dataset, plan)
    second.load_state_dict(first.state_dict())
    rest = list(second.windows(5))
    assert [step for step, _ in rest] == list(range(stop, 5))
    assert all(same(window, windows[step]) for step, window in rest)


def test_a_window_in_hand_is_not_yet_consumed(dataset: WindowDataset, plan: SamplePlan) -> None:
    """A checkpoint written in the middle of a step must name this step again."""
    loader = loader_of(dataset, plan)
    running = loader.windows(3)
    next(running)
    assert loader.state_dict()["step"] == 0
    next(running)
    assert loader.state_dict() == {"step": 1, **IDENTITY}


@pytest.mark.parametrize(("key", "value"), [("data", "another"), ("run.seed", 6), ("data.lanes", 4)])
def test_other_data_or_another_order_is_refused(key: str, value: Any, dataset: WindowDataset, plan: SamplePlan) -> None:
    state = loader_of(dataset, plan).state_dict() | {"step": 2}
    changed = loader_of(dataset, plan, **{key: value})
    with pytest.raises(UserError) as caught:
        changed.load_state_dict(state)
    assert str(caught.value) == f"the checkpoint was made with {key} = {IDENTITY[key]}, this run has {value}"
    assert changed.step == 0


def test_a_state_that_lacks_a_setting_is_refused(dataset: WindowDataset, plan: SamplePlan) -> None:
    with pytest.raises(UserError, match="data"):
        loader_of(dataset, plan).load_state_dict({"step": 2})


def test_worker_processes_give_the_same_windows(dataset: WindowDataset, windows: list[Window]) -> None:
    made = list(iterate_windows(dataset, range(1, 5), num_workers=2, pin_memory=False))
    assert len(made) == 4
    assert all(same(a, b) for a, b in zip(made, windows[1:], strict=True))


def from_elsewhere(number: int, worker: Any) -> None:
    """Send a signal as a scheduler does: from a process that is not the worker's trainer."""
    subprocess.run(["kill", f"-{int(number)}", str(worker.pid)], check=True)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2])
def test_a_signal_to_all_processes_does_not_end_the_workers(
    number: int, dataset: WindowDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Schedulers signal whole jobs: catches workers that die before the trainer has ended its step, or some time after
    while an evaluation still needs them."""
    monkeypatch.setattr("ilvr_ds.data.loader.ALIVE_S", 0.2)
    before = set(multiprocessing.active_children())
    windows = iterate_windows(dataset, range(12), 2, pin_memory=False)
    next(windows), next(windows)  # one of each worker: both have come so far as to expect signals
    workers = set(multiprocessing.active_children()) - before
    assert len(workers) == 2
    for worker in workers:
        from_elsewhere(number, worker)
    time.sleep(1.5)
    assert len(list(windows)) == 10
    assert not any(worker.is_alive() for worker in workers)


class Slow:
    """A sample that takes a minute. Picklable."""

    def __call__(self, step: int) -> list[Any]:
        time.sleep(60 * step)
        return [np.array([0, 1])]


def test_a_trainer_ends_its_workers_however_busy(dataset: WindowDataset) -> None:
    """Catches a process that cannot end because it waits for a worker that heeds no signal."""
    before = set(multiprocessing.active_children())
    windows = iterate_windows(replace(dataset, numbers_of=Slow()), range(2), 2, pin_memory=False)
    next(windows)
    handler = signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's raises in this process when a worker ends
    try:
        for worker in set(multiprocessing.active_children()) - before:
            worker.terminate()
            worker.join(10)
            assert not worker.is_alive()
    finally:
        signal.signal(signal.SIGCHLD, handler)


def test_workers_end_when_their_trainer_is_gone(dataset: WindowDataset, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches processes that a killed trainer leaves behind, busy with a read that takes its time."""
    monkeypatch.setattr("ilvr_ds.data.loader.ALIVE_S", 0.2)
    receiver, sender = multiprocessing.Pipe(duplex=False)

    def train() -> None:
        windows = iterate_windows(replace(dataset, numbers_of=Slow()), range(2), 2, pin_memory=False)
        next(windows)
        sender.send([worker.pid for worker in multiprocessing.active_children()])
        time.sleep(60)

    trainer = multiprocessing.get_context("fork").Process(target=train)
    trainer.start()
    assert receiver.poll(60)
    workers = [psutil.Process(pid) for pid in receiver.recv()]
    assert len(workers) == 2
    trainer.kill()
    trainer.join()
    deadline = time.monotonic() + 20
    while any(worker.is_running() and worker.status() != psutil.STATUS_ZOMBIE for worker in workers):
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_a_pickled_dataset_gives_the_same_window(dataset: WindowDataset, windows: list[Window]) -> None:
    """Workers that are spawned, not forked, get it this way."""
    copy = pickle.loads(pickle.dumps(dataset))
    assert same(copy[3], windows[3])


def test_ranks_share_a_step(folder: Path, golden: GoldenSet, plan: SamplePlan, windows: list[Window]) -> None:
    shares = [
        dataset_of(folder, golden, PlannedNumbers(plan, rank, world=2, micro_batch_size=2))[1] for rank in range(2)
    ]
    assert [len(ids(share)) for share in shares] == [2, 2]
    assert sorted(ids(shares[0]) + ids(shares[1])) == sorted(ids(windows[1]))


def test_evaluation_reads_in_stored_order_rank_by_rank(folder: Path, golden: GoldenSet) -> None:
    seen = {}
    for rank in range(2):
        held_out = dataset_of(folder, golden, SequentialNumbers(batch=2, rank=rank, world=2))
        seen[rank] = [ids(window) for window in iterate_windows(held_out, range(2), 0, pin_memory=False)]
    assert seen == {
        0: [["sample-0", "sample-1"], ["sample-4", "sample-5"]],
        1: [["sample-2", "sample-3"], ["sample-6", "sample-7"]],
    }


@pytest.mark.parametrize("workers", [0, 2])
def test_a_sample_that_is_too_long_is_replaced_and_named(workers: int, dataset: WindowDataset) -> None:
    """From a worker too. Catches a sample that is cut, and one that ends the run by a traceback."""
    whole = dataset.encoder
    short = SampleEncoder(whole.tokenizer, whole.special, whole.images, whole.latent_size, max_tokens=20)
    narrow = replace(dataset, encoder=short, numbers_of=SequentialNumbers(2, 0, 1))
    [window] = iterate_windows(narrow, [3], workers, pin_memory=False)
    assert [(bad.number, bad.id, bad.shard) for bad in window.bad] == [
        (6, "sample-6", "shard-000001.tar"),
        (7, "sample-7", "shard-000001.tar"),
    ]
    assert "data.max_tokens allows 20" in window.bad[0].reason and "\n" not in window.bad[0].reason
    assert int(window.supervised) == 0


def test_a_sample_without_a_plan_is_replaced(tmp_path: Path, golden: GoldenSet) -> None:
    """Trained on, it would teach the model to end its turn at once."""
    write_shards([(make_sample(0), 0), (make_sample(1, plan=False), 0)], tmp_path / "set")
    dataset = dataset_of(tmp_path / "set", golden, SequentialNumbers(2, 0, 1))
    [bad] = dataset.window([np.array([0, 1])]).bad
    assert (bad.number, bad.reason) == (1, "it has no reasoning steps to learn from")
