from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest

from ilvr_ds.data.sample import Sample
from ilvr_ds.data.template import EncodedSample
from ilvr_ds.generation.decoder import Decoder
from ilvr_ds.generation.generate import Generator
from ilvr_ds.generation.loading import Reasoner
from ilvr_ds.generation.settings import GenerationSettings
from ilvr_ds.serving.batches import Batches, Job
from ilvr_ds.serving.refusal import RefusedError
from tests.serving.jobs import that_speak, until

SETTINGS = GenerationSettings(max_new_tokens=6)
WAIT_S = 120


@pytest.fixture
def prompts(latent_reasoner: Reasoner) -> list[EncodedSample]:
    return [latent_reasoner.encoder.prompt(Sample(f"{n}", text, ())) for n, text in enumerate(("Why?", "How?", "?"))]


@pytest.fixture
def batches(latent_reasoner: Reasoner) -> Iterator[Batches]:
    """Not started yet."""
    batches = Batches(latent_reasoner, batch_size=2, most_waiting=5)
    yield batches
    if batches.is_alive:
        batches.close()


def test_what_waits_and_is_alike_is_answered_together_in_order(
    batches: Batches, prompts: list[EncodedSample], latent_reasoner: Reasoner
) -> None:
    """Batches of two: first and third (alike), then the other sampling, then the last. Catches mixed-up answers."""
    other = GenerationSettings(max_new_tokens=3)
    jobs = [Job(prompts[n % 3], SETTINGS if n != 1 else other) for n in range(4)]
    for job in jobs:
        batches.submit(job)
    assert batches.waiting == 4
    batches.start()
    for job in jobs:
        [expected] = Generator(latent_reasoner, job.settings)([job.prompt]).answers
        assert job.answer.result(WAIT_S) == expected
    assert (batches.counts.batches, batches.counts.answered) == (3, 4)


def test_with_a_decoder_requests_join_as_rows_become_free(
    prompts: list[EncodedSample], latent_reasoner: Reasoner
) -> None:
    """Three join two that are being answered, in one batch, and nobody is overtaken by who came later: one with another
    sampling, then one that would fit. Catches answers and pieces of text that go to others."""
    batches = Batches(replace(latent_reasoner, decoder=Decoder(latent_reasoner)), batch_size=2, most_waiting=9)
    speaking, other = that_speak(latent_reasoner, GenerationSettings(max_new_tokens=12)), GenerationSettings(3)
    pieces: dict[int, list[str]] = {n: [] for n in range(7)}
    jobs = [Job(prompts[n % 3], other if n == 5 else speaking, pieces[n].append) for n in range(7)]
    for job in jobs:
        batches.submit(job)
    batches.start()
    for number, job in enumerate(jobs):
        [expected] = Generator(latent_reasoner, job.settings)([job.prompt]).answers
        assert job.answer.result(WAIT_S) == expected
        assert "".join(pieces[number]) == expected.text.rstrip("\ufffd")
    batches.close()
    assert (batches.counts.batches, batches.counts.answered) == (3, 7)


def test_a_full_queue_refuses_and_forgets_whom_nobody_waits_for(batches: Batches, prompts: list[EncodedSample]) -> None:
    jobs = [Job(prompts[0], SETTINGS) for _ in range(6)]
    for job in jobs[:5]:
        batches.submit(job)
    with pytest.raises(RefusedError, match="5 requests waiting") as refused:
        batches.submit(jobs[5])
    assert refused.value.status == 429
    jobs[0].is_abandoned = True
    jobs[1].answer.cancel()
    batches.submit(jobs[5])
    assert batches.waiting == 4 and batches.counts.abandoned == 2
    batches.start()
    assert [job.answer.result(WAIT_S).id for job in jobs[2:]] == ["0"] * 4


def test_a_batch_ends_when_nobody_waits_for_it(
    batches: Batches, prompts: list[EncodedSample], latent_reasoner: Reasoner
) -> None:
    job = Job(prompts[0], that_speak(latent_reasoner, GenerationSettings(max_new_tokens=400)))

    def leave(piece: str) -> None:
        job.is_abandoned = True

    job.on_text = leave
    batches.submit(job)
    batches.start()
    assert len(job.answer.result(WAIT_S).tokens) < 50


def test_a_batch_that_fails_is_said_and_the_next_is_answered(
    batches: Batches, prompts: list[EncodedSample], latent_reasoner: Reasoner, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(piece: str) -> None:
        raise RuntimeError("out of memory")

    bad = Job(prompts[0], that_speak(latent_reasoner, SETTINGS), fail)
    good = Job(prompts[1], GenerationSettings(max_new_tokens=2))
    batches.submit(bad)
    batches.submit(good)
    batches.start()
    with pytest.raises(RefusedError, match="the batch failed: out of memory"):
        bad.answer.result(WAIT_S)
    assert good.answer.result(WAIT_S).id == "1" and batches.counts.failed == 1
    assert "a batch of 1 request failed" in caplog.text


def test_a_batch_that_cannot_begin_is_said(
    batches: Batches, prompts: list[EncodedSample], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches clients that wait for ever once a device has failed."""

    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("device-side assert")

    monkeypatch.setattr("ilvr_ds.serving.batches.Generator", fail)
    job = Job(prompts[0], SETTINGS)
    batches.submit(job)
    batches.start()
    with pytest.raises(RefusedError, match="the batch failed: device-side assert"):
        job.answer.result(5)
    assert batches.counts.failed == 1


def test_closing_refuses_what_waits_and_cuts_off_what_runs(batches: Batches, prompts: list[EncodedSample]) -> None:
    waiting = Job(prompts[1], SETTINGS)
    running = Job(prompts[0], GenerationSettings(max_new_tokens=100_000))
    batches.submit(running)
    batches.start()
    until(lambda: batches.waiting == 0)
    batches.submit(waiting)
    batches.close()
    for job in (running, waiting):
        with pytest.raises(RefusedError, match="being stopped"):
            job.answer.result(WAIT_S)
    with pytest.raises(RefusedError, match="being stopped"):
        batches.submit(Job(prompts[0], SETTINGS))
