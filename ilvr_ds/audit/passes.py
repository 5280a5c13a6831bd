"""The two passes over the samples: own answers first, and then, with everybody's latents known, all that is changed.

Every answer of a sample has the same prompt, budget and decoding. Batches are those of an evaluation: what a sample
gets does not depend on kills or on the number of ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from ilvr_ds.audit.donors import Swap
from ilvr_ds.audit.readings.attention import attention_shares
from ilvr_ds.audit.readings.probability import AnswerProbability
from ilvr_ds.audit.readings.retrieval import Retrieval
from ilvr_ds.audit.readings.targets import Chosen, TargetChooser
from ilvr_ds.audit.settings import BARRED
from ilvr_ds.audit.store import LatentStore
from ilvr_ds.data.sample import Sample
from ilvr_ds.data.template import EncodedSample
from ilvr_ds.evaluation.ablation import latent_source
from ilvr_ds.evaluation.preparation import Prepared
from ilvr_ds.evaluation.results import Line
from ilvr_ds.generation.answers import Answer
from ilvr_ds.generation.context import Context
from ilvr_ds.generation.generate import Generator
from ilvr_ds.generation.latent_sources import FirstRepeated, Given, HalfOwn, LatentSource, OwnStates, whole_segments
from ilvr_ds.generation.row_modes import Barred


@dataclass(frozen=True)
class OwnPass:
    """Answers with own latents, the targets of the samples, and what is inside both."""

    ready: Prepared
    store: LatentStore
    chooser: TargetChooser | None
    """None: no test needs targets"""
    retrieval: Retrieval | None
    attended: frozenset[int]
    """Numbers of the samples whose attention is looked at"""

    def answer(self, batch: range) -> list[Line]:
        """The lines of a batch; its latents are in the store before."""
        ready, reasoner = self.ready, self.ready.reasoner
        numbers, samples, prompts = ready.batch(batch)
        settings = replace(ready.settings.generation, keep_latents=True)
        answers = Generator(reasoner, settings)(prompts).answers
        own = [whole_segments(answer, reasoner.latent_size) for answer in answers]
        chosen = self.chooser(samples) if self.chooser else [Chosen()] * len(samples)
        filler = reasoner.pad_embedding
        targets = [targets.latents(reasoner.latent_size, filler) for targets in chosen]
        self.store.write(
            {"own": dict(zip(numbers, own, strict=True)), "target": dict(zip(numbers, targets, strict=True))}
        )
        lines = []
        for number, sample, prompt, answer, latents, found in zip(
            numbers, samples, prompts, answers, own, chosen, strict=True
        ):
            line = self._line(number, sample, answer)
            if self.retrieval and found.candidates and latents:
                line["retrieval"] = self.retrieval(number, latents, found)
            if number in self.attended and latents:
                line["attention"] = attention_shares(reasoner, prompt, answer)
            lines.append(line)
        return lines

    def _line(self, number: int, sample: Sample, answer: Answer) -> Line:
        benchmark = self.ready.benchmark
        return {
            "number": number,
            "id": sample.id,
            "type": sample.group,
            "question": sample.question,
            "answer": sample.answer,
            "has_targets": bool(sample.helper_images),
            "response": answer.text,
            "read": benchmark.answer(sample, answer.text),
            "right": benchmark.is_right(sample, answer.text),
            "tokens": answer.tokens,
            "steps": list(answer.steps),
            "hit_limit": answer.hit_limit,
        }


@dataclass(frozen=True)
class Plan:
    """What the second pass changes."""

    replacements: tuple[str, ...] = ()
    next_sample: dict[int, int | None] | None = None
    """Whose latents `other_sample` takes, by number"""
    next_of_group: dict[int, int | None] | None = None
    swaps: dict[int, Swap] | None = None
    """None: no donor swap"""
    is_barred: bool = False


@dataclass(frozen=True)
class ChangedPass:
    """Answers with other latents, and without sight of the image."""

    ready: Prepared
    store: LatentStore
    own_lines: dict[int, Line]
    plan: Plan

    def answer(self, batch: range) -> list[Line]:
        """The lines of a batch."""
        reasoner = self.ready.reasoner
        numbers, samples, prompts = self.ready.batch(batch)
        own = [self._own_answer(number) for number in numbers]
        rows = _Rows(numbers, samples, prompts, own, self._read(prompts))
        lines: list[Line] = [{"number": number} for number in numbers]
        if self.plan.replacements:
            probability = AnswerProbability(reasoner, rows.samples, rows.prompts, rows.own)
            own_source = Given([list(a.latents) for a in rows.own], reasoner.latent_size, reasoner.device)
            for line, nats in zip(lines, probability(own_source), strict=True):
                line["own_logp"] = nats
            for name in self.plan.replacements:
                self._replace(name, rows, probability, lines)
        if self.plan.swaps is not None:
            self._swap(rows, lines)
        if self.plan.is_barred:
            self._bar(rows, lines)
        return lines

    def _own_answer(self, number: int) -> Answer:
        """As it was in the first pass."""
        line = self.own_lines[number]
        [latents] = self.store.read("own", [number])
        return Answer(
            line["id"], line["response"], line["tokens"], tuple(line["steps"]), line["hit_limit"], tuple(latents)
        )

    def _replace(self, name: str, rows: _Rows, probability: AnswerProbability, lines: list[Line]) -> None:
        source = self._source(name, rows)
        answers = self._generate(rows.prompts, rows.read, source)
        has_source = getattr(source, "has_donor", [True] * len(lines))
        nats = probability(self._source(name, rows))
        for row, (line, answer) in enumerate(zip(lines, answers, strict=True)):
            judged = self._judged(rows.numbers[row], rows.samples[row], answer)
            line.setdefault("replacement", {})[name] = judged | {"logp": nats[row], "has_source": has_source[row]}

    def _source(self, name: str, rows: _Rows) -> LatentSource | None:
        """What a replacement feeds; None: no segment is opened."""
        reasoner = self.ready.reasoner
        if name == "skipped":
            return None
        if name == "first_repeated":
            return FirstRepeated()
        if name == "half_slots":
            return HalfOwn()
        if name == "true":
            return self._given(self.store.read("target", rows.numbers))
        if name in ("other_sample", "same_group"):
            following = self.plan.next_sample if name == "other_sample" else self.plan.next_of_group
            return self._given(self.store.read("own", [(following or {})[number] for number in rows.numbers]))
        return latent_source(name, reasoner, rows.own, self.ready.settings.generation.seed)

    def _given(self, banks: Sequence[Sequence[Tensor]]) -> Given:
        return Given(banks, self.ready.reasoner.latent_size, self.ready.reasoner.device)

    def _swap(self, rows: _Rows, lines: list[Line]) -> None:
        """Pairs alone: the partner's latents, its own given back, and a third sample's."""
        swaps = self.plan.swaps or {}
        places = [place for place, number in enumerate(rows.numbers) if number in swaps]
        if not places:
            return
        numbers = [rows.numbers[place] for place in places]
        prompts = [rows.prompts[place] for place in places]
        read = self._read(prompts)
        mine = [swaps[number] for number in numbers]
        givers: dict[str, list[int | None]] = {
            "donor": [swap.donor for swap in mine],
            "self": list(numbers),
            "unrelated": [swap.unrelated for swap in mine],
        }
        for name, numbers_of_givers in givers.items():
            source = self._given(self.store.read("own", numbers_of_givers))
            answers = self._generate(prompts, read, source)
            for swap, place, answer, has_source in zip(mine, places, answers, source.has_donor, strict=True):
                judged = self._judged(rows.numbers[place], rows.samples[place], answer)
                judged |= self._as_the_donor(swap.donor, rows.samples[place], answer, judged["read"])
                line = lines[place].setdefault("donor", {"partner": swap.donor, "same_words": swap.same_words})
                line[name] = judged | {"has_source": has_source}

    def _as_the_donor(self, donor: int, sample: Sample, answer: Answer, read: str) -> dict[str, bool]:
        """Whether the answer is the one that is right for the donor, and whether the donor was answered the same."""
        line = self.own_lines[donor]
        follows = self.ready.benchmark.is_right(replace(sample, answer=line["answer"]), answer.text)
        return {"follows": follows, "follows_response": read == line["read"] != ""}

    def _bar(self, rows: _Rows, lines: list[Line]) -> None:
        for barred in BARRED:
            for name in ("own", "zeros"):
                source = OwnStates() if name == "own" else self._source(name, rows)
                answers = self._generate(rows.prompts, rows.read, source, barred)
                for row, (line, answer) in enumerate(zip(lines, answers, strict=True)):
                    judged = self._judged(rows.numbers[row], rows.samples[row], answer)
                    line.setdefault("barred", {}).setdefault(barred, {})[name] = judged

    def _read(self, prompts: list[EncodedSample]) -> Context:
        """What all answers to the prompts go on from."""
        return Context(self.ready.reasoner, prompts, self.ready.settings.generation.max_new_tokens)

    def _generate(
        self,
        prompts: list[EncodedSample],
        read: Context,
        source: LatentSource | None,
        barred: Barred | None = None,
    ) -> list[Answer]:
        """source None: no segment is opened, and the next best word comes in its place."""
        reasoner, settings = self.ready.reasoner, self.ready.settings.generation
        if source is None:
            settings = replace(settings, forbidden=(*settings.forbidden, reasoner.special.latent_start))
        return Generator(reasoner, settings, source, barred=barred)(prompts, read).answers

    def _judged(self, number: int, sample: Sample, answer: Answer) -> dict[str, Any]:
        benchmark = self.ready.benchmark
        read = benchmark.answer(sample, answer.text)
        return {
            "response": answer.text,
            "read": read,
            "right": benchmark.is_right(sample, answer.text),
            "changed": read != self.own_lines[number]["read"],
        }


@dataclass(frozen=True)
class _Rows:
    """A batch."""

    numbers: list[int]
    samples: list[Sample]
    prompts: list[EncodedSample]
    own: list[Answer]
    """With their whole segments' latents"""
    read: Context
    """The prompts, read once for all that is changed"""
