"""The batches of a data set, answered by all ranks until all are done or a signal asks to stop."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from functools import partial
from typing import TextIO

from ilvr_ds import dist
from ilvr_ds.evaluation.results import Line, Results, append
from ilvr_ds.monitoring.stop_signal import StopSignal

logger = logging.getLogger("ilvr_ds")
LOGGED_EVERY = 100
"""Samples between two lines of the log"""


class Stopped(Exception):  # noqa: N818  no mistake: somebody wished it
    """A signal asked to stop; raised on every rank. The text says what is kept and how to go on."""


def cut_batches(count: int, size: int) -> list[range]:
    """Places 0..count-1 in runs of `size`; a single sample at the end joins the run before it."""
    starts = list(range(0, count, size))
    if len(starts) > 1 and size > 1 and count - starts[-1] == 1:
        starts.pop()
    return [range(start, stop) for start, stop in zip(starts, [*starts[1:], count], strict=True)]


def answer_batches(
    results: Results,
    numbers: list[int],
    size: int,
    answer: Callable[[range], list[Line]],
    what: str,
    signal: StopSignal,
) -> None:
    """Write down what `answer` makes of each batch of places in `numbers` that is not done yet (collective).

    Rank r takes batches r, r + world, ... `what` names the work in the log. Raises Stopped on all ranks where a signal
    came to one: that rank drops the batch in hand, the others end theirs, for ranks do not wait for each other before
    the end.
    """
    done = dist.decided_by_main(lambda: _done(results))
    batches = cut_batches(len(numbers), size)[dist.rank() :: dist.world_size()]
    mine = [batch for batch in batches if not done.issuperset(numbers[batch.start : batch.stop])]
    logger.info("%s: %d samples, %d of them done", what, len(numbers), len(done))
    with results.part(dist.rank()) as file:
        for number, batch in enumerate(mine, start=1):
            lines = None if dist.is_told_to_stop() else signal.unless_asked(partial(answer, batch))
            if lines is None:
                dist.tell_all_to_stop()
                break
            append(file, [line for line in lines if line["number"] not in done])
            logger.info("batch %d of %d", number, len(mine))
    _end(results, numbers, what, signal)


def answer_stream(
    results: Results, numbers: list[int], answers: Callable[[list[int]], Iterator[Line]], what: str, signal: StopSignal
) -> None:
    """The same for samples that need no others beside them: `answers` makes lines of the numbers that it is given, in
    any order, and each is written down as it comes.

    A signal drops the answers in hand.
    """
    done = dist.decided_by_main(lambda: _done(results))
    mine = [number for number in numbers[dist.rank() :: dist.world_size()] if number not in done]
    logger.info("%s: %d samples, %d of them done", what, len(numbers), len(done))
    with results.part(dist.rank()) as file:
        _append_all(file, answers(mine), len(mine), signal)
    _end(results, numbers, what, signal)


def _append_all(file: TextIO, lines: Iterator[Line], count: int, signal: StopSignal) -> None:
    for number in range(1, count + 1):
        line = None if dist.is_told_to_stop() else signal.unless_asked(partial(next, lines))
        if line is None:
            dist.tell_all_to_stop()
            break
        append(file, [line])
        if number % LOGGED_EVERY == 0:
            logger.info("sample %d of %d", number, count)


def _end(results: Results, numbers: list[int], what: str, signal: StopSignal) -> None:
    """Wait for all ranks; raises Stopped where samples are left."""
    dist.barrier(partial(_pass_on, signal))
    kept = dist.decided_by_main(lambda: len(_done(results)))
    if kept < len(numbers):
        raise Stopped(
            f"stopped by a signal; {what}: {kept} of {len(numbers)} samples are done and kept in {results.folder}; "
            "start the same command again to go on"
        )


def _pass_on(signal: StopSignal) -> None:
    """A rank that has no batch left tells the others that it was asked."""
    if signal.requested:
        dist.tell_all_to_stop()


def _done(results: Results) -> set[int]:
    return {line["number"] for line in results.lines()}
