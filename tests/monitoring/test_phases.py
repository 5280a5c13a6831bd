from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from ilvr_ds.monitoring import phases
from ilvr_ds.monitoring.phases import PHASES, PhaseTimer, shares
from tests.monitoring.clock import Clock

CPU = torch.device("cpu")


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(phases, "time", SimpleNamespace(perf_counter=clock))
    return clock


def test_phases_add_up_until_they_are_looked_at(clock: Clock) -> None:
    timer = PhaseTimer(CPU)
    for seconds, name in ((1.0, "teacher"), (2.0, "forward"), (4.0, "forward")):
        clock.now += 0.5
        with timer(name):
            clock.now += seconds
    assert timer.take() == {"other": 1.5, "teacher": 1.0, "forward": 6.0}
    assert timer.take() == {"other": 0.0}


def test_a_phase_within_another_takes_its_time_away(clock: Clock) -> None:
    timer = PhaseTimer(CPU)
    with timer("forward"):
        clock.now += 1
        with timer("selection"):
            clock.now += 2
        clock.now += 4
    assert timer.take() == {"other": 0.0, "forward": 5.0, "selection": 2.0}


def test_a_phase_that_fails_ends_too(clock: Clock) -> None:
    timer = PhaseTimer(CPU)
    with pytest.raises(ZeroDivisionError), timer("forward"):
        clock.now += 1
        raise ZeroDivisionError
    clock.now += 3
    assert timer.take() == {"other": 3.0, "forward": 1.0}


def test_evaluation_is_no_forward_of_the_training(clock: Clock) -> None:
    timer = PhaseTimer(CPU)
    with timer("evaluation"), timer("forward"):
        clock.now += 8
    with timer("forward"):
        clock.now += 3
    clock.now += 1
    seconds = timer.take()
    assert seconds == {"other": 1.0, "evaluation": 8.0, "forward": 3.0}
    metrics = shares([seconds])
    assert metrics["speed/share/forward"] == 0.75 and metrics["speed/share/other"] == 0.25


def test_the_time_until_an_item_is_there_is_a_phase(clock: Clock) -> None:
    def slow() -> object:
        for number in range(2):
            clock.now += 5
            yield number

    timer = PhaseTimer(CPU)
    for _ in timer.around("data", slow()):
        clock.now += 1
    assert timer.take() == {"other": 2.0, "data": 10.0}


def test_shares_are_means_over_ranks_and_name_every_phase() -> None:
    metrics = shares([{"data": 1.0, "forward": 3.0}, {"forward": 2.0, "pictures": 9.0}])
    assert metrics.keys() == {f"speed/share/{name}" for name in PHASES}
    assert metrics["speed/share/data"] == 0.125 and metrics["speed/share/forward"] == 0.875
    assert sum(metrics.values()) == 1.0
