"""One queue in front of one model: requests that wait, and want the same sampling, are answered as one batch.

A thread does all the decoding. While it is busy requests gather, so batches grow with the load by themselves.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field

from ilvr_ds.data.template import EncodedSample
from ilvr_ds.errors import counted, first_line
from ilvr_ds.generation.answers import Answer
from ilvr_ds.generation.generate import Generator
from ilvr_ds.generation.loading import Reasoner
from ilvr_ds.generation.settings import GenerationSettings
from ilvr_ds.serving.refusal import RefusedError

logger = logging.getLogger("ilvr_ds")


@dataclass(eq=False)
class Job:
    """A prompt that waits for its answer."""

    prompt: EncodedSample
    settings: GenerationSettings
    on_text: Callable[[str], None] | None = None
    """Gets the answer piece by piece, in the decoding thread."""
    answer: Future[Answer] = field(default_factory=Future)
    """Or a RefusedError."""
    is_abandoned: bool = False
    """Nobody waits for the answer any more."""


@dataclass
class Counts:
    """Since the start."""

    answered: int = 0
    batches: int = 0
    failed: int = 0
    abandoned: int = 0


class Batches:
    """The queue and its thread. `start` comes first, `close` ends what is being answered."""

    def __init__(self, reasoner: Reasoner, batch_size: int, most_waiting: int) -> None:
        self.reasoner = reasoner
        self.batch_size = batch_size
        self.most_waiting = most_waiting
        self.counts = Counts()
        self._waiting: list[Job] = []
        self._is_closing = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="batches", daemon=True)

    @property
    def waiting(self) -> int:
        """Requests that are not being answered yet."""
        return len(self._waiting)

    @property
    def is_alive(self) -> bool:
        """Whether requests are being answered."""
        return self._thread.is_alive()

    def start(self) -> None:
        """Begin to answer."""
        self._thread.start()

    def close(self) -> None:
        """Refuse what waits, cut off what is being answered, and wait for the thread."""
        with self._changed:
            self._is_closing = True
            self._changed.notify_all()
        self._thread.join()

    def submit(self, job: Job) -> None:
        """Put a job at the end of the queue. Raises RefusedError where it is full, or closed."""
        with self._changed:
            self._forget_abandoned()
            if self._is_closing:
                raise _closing()
            if len(self._waiting) >= self.most_waiting:
                waiting = counted(len(self._waiting), "request")
                raise RefusedError(429, f"{waiting} waiting; try again later", None, "queue_full")
            self._waiting.append(job)
            self._changed.notify_all()

    def _run(self) -> None:
        while batch := self._next():
            self._answer(batch)

    def _next(self) -> list[Job]:
        """The job that has waited longest, with others of the same settings; empty when the queue is closed."""
        with self._changed:
            while not self._is_closing:
                self._forget_abandoned()
                if self._waiting:
                    alike = [job for job in self._waiting if job.settings == self._waiting[0].settings]
                    taken = alike[: self.batch_size]
                    self._waiting = [job for job in self._waiting if job not in taken]
                    if batch := _claimed(taken):
                        return batch
                else:
                    self._changed.wait()
            for job in _claimed(self._waiting):
                job.answer.set_exception(_closing())
            self._waiting = []
            return []

    def _forget_abandoned(self) -> None:
        kept = [job for job in self._waiting if not (job.is_abandoned or job.answer.cancelled())]
        self.counts.abandoned += len(self._waiting) - len(kept)
        self._waiting = kept

    def _answer(self, batch: list[Job]) -> None:
        """A batch that fails, for want of memory for example, is said to those who wait; the next is answered."""

        def show(row: int, piece: str) -> None:
            if send := batch[row].on_text:
                send(piece)

        def is_over(ended: bool) -> bool:
            return ended or self._is_closing or all(job.is_abandoned for job in batch)

        on_text = show if any(job.on_text for job in batch) else None
        generator = Generator(self.reasoner, batch[0].settings, on_text=on_text, is_over=is_over)
        self.counts.batches += 1
        try:
            generated = generator([job.prompt for job in batch])
        except Exception as error:
            logger.exception("a batch of %s failed", counted(len(batch), "request"))
            self.counts.failed += len(batch)
            for job in batch:
                job.answer.set_exception(RefusedError(500, f"the batch failed: {first_line(error)}"))
            return
        logger.info("%s: %s", counted(len(batch), "request"), generated.summary())
        self.counts.answered += len(batch)
        for job, answer in zip(batch, generated.answers, strict=True):
            if self._is_closing and answer.hit_limit:
                job.answer.set_exception(_closing())
            else:
                job.answer.set_result(answer)


def _claimed(jobs: list[Job]) -> list[Job]:
    """Those that nobody has cancelled, and nobody can cancel from now on."""
    return [job for job in jobs if job.answer.set_running_or_notify_cancel()]


def _closing() -> RefusedError:
    return RefusedError(503, "the server is being stopped")
