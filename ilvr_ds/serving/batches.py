"""One queue in front of one model: requests that wait, and want the same sampling, are answered together.

A thread does all the decoding. With a decoder (on a GPU) requests join as rows become free; without one they gather
while a batch is answered, so that batches grow with the load by themselves.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from itertools import takewhile

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
        """A batch, and with a decoder whoever joins it; a failure, for want of memory for example, is said to those who
        wait, and the next batch is answered."""
        answering = _Answering(self, batch)
        self.counts.batches += 1
        try:
            answering.run()
        except Exception as error:
            jobs = answering.unanswered
            logger.exception("a batch of %s failed", counted(len(jobs), "request"))
            self.counts.failed += len(jobs)
            for job in jobs:
                job.answer.set_exception(RefusedError(500, f"the batch failed: {first_line(error)}"))

    def _hand_out(self, job: Job, answer: Answer) -> None:
        self.counts.answered += 1
        if self._is_closing and answer.hit_limit:
            job.answer.set_exception(_closing())
        else:
            job.answer.set_result(answer)

    def _joining(self, settings: GenerationSettings, most: int) -> list[Job]:
        """Those at the head of the queue that want the same sampling: nobody is overtaken by who came later."""
        with self._changed:
            if self._is_closing:
                return []
            self._forget_abandoned()
            alike = list(takewhile(lambda job: job.settings == settings, self._waiting))[:most]
            self._waiting = self._waiting[len(alike) :]
            return _claimed(alike)


class _Answering:
    """Of jobs that want the same sampling, by one generator."""

    def __init__(self, batches: Batches, batch: list[Job]) -> None:
        self.batches, self.settings = batches, batch[0].settings
        self.jobs: dict[int, Job] = {}
        """Those that wait for their answer, by the number of the prompt"""
        self._first = batch
        self._count = 0

    @property
    def unanswered(self) -> list[Job]:
        """Those that wait, also where nothing has begun."""
        return [*self.jobs.values(), *self._first]

    def run(self) -> None:
        """Until all have been answered and nobody joins."""
        batches = self.batches
        can_join = batches.reasoner.decoder is not None
        on_text = self._show if can_join or any(job.on_text for job in self._first) else None
        generator = Generator(batches.reasoner, self.settings, on_text=on_text, is_over=self._is_over)
        for number, answer in generator.queue(self._more, batches.batch_size):
            batches._hand_out(self.jobs.pop(number), answer)
        logger.info("%s: %s", counted(self._count, "request"), generator.speed.in_words())

    def _more(self, most: int) -> list[EncodedSample]:
        taken, self._first = self._first[:most], self._first[most:]
        taken = taken or self.batches._joining(self.settings, most)
        for job in taken:
            self.jobs[self._count] = job
            self._count += 1
        return [job.prompt for job in taken]

    def _show(self, number: int, piece: str) -> None:
        if send := self.jobs[number].on_text:
            send(piece)

    def _is_over(self, ended: bool) -> bool:
        return ended or self.batches._is_closing or all(job.is_abandoned for job in self.jobs.values())


def _claimed(jobs: list[Job]) -> list[Job]:
    """Those that nobody has cancelled, and nobody can cancel from now on."""
    return [job for job in jobs if job.answer.set_running_or_notify_cancel()]


def _closing() -> RefusedError:
    return RefusedError(503, "the server is being stopped")
