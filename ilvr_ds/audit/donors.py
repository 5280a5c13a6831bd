"""Whose latents are swapped: pure functions of what the samples are, whatever batch or rank they fall to."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from heapq import heapify, heappop, heappush

LOOKED_AT = 256
"""Samples among which a third one is sought: in larger data sets the rest is not needed."""


@dataclass(frozen=True)
class Member:
    """A sample as pairing sees it."""

    number: int
    """In the data set"""
    id: str
    question: str
    group: str
    answer: str
    """As answers are compared; "" where it has none"""


@dataclass(frozen=True)
class Swap:
    """Whose latents a sample gets."""

    donor: int
    """Number of its partner, which has another answer"""
    unrelated: int | None
    """Number of a third sample, whose answer is not the donor's"""
    same_words: bool
    """The partner has the same question; else it is of the same group alone"""


def find_swaps(members: Sequence[Member]) -> dict[int, Swap]:
    """Disjoint pairs with different answers, by number, each way: of the same words first, else within a group."""
    swaps: dict[int, Swap] = {}
    order = _shuffled(members)
    for same_words, key in ((True, _by_words), (False, _by_group)):
        left = [member for member in members if member.number not in swaps and member.answer]
        for pool in _buckets(left, key):
            for one, other in _pairs(pool):
                for member, donor in ((one, other), (other, one)):
                    swaps[member.number] = Swap(donor.number, _third(member, donor, order), same_words)
    return swaps


def next_members(members: Sequence[Member], within_group: bool) -> dict[int, int | None]:
    """Of each sample the next in an order by id (the last is followed by the first), by number; None for a lone one."""
    following: dict[int, int | None] = {}
    for pool in _buckets(members, _by_group if within_group else lambda member: ""):
        order = _shuffled(pool)
        for member, after in zip(order, [*order[1:], order[0]], strict=True):
            following[member.number] = after.number if len(order) > 1 else None
    return following


def _by_words(member: Member) -> str:
    return f"{member.group}\n{member.question}"


def _by_group(member: Member) -> str:
    return member.group


def _buckets(members: Sequence[Member], key: Callable[[Member], str]) -> list[list[Member]]:
    found: dict[str, list[Member]] = {}
    for member in members:
        found.setdefault(key(member), []).append(member)
    return list(found.values())


def _shuffled(members: Sequence[Member]) -> list[Member]:
    """An order that neighbours in the data set do not keep, and that depends on ids alone."""
    return sorted(members, key=lambda member: (zlib.crc32(member.id.encode()), member.id))


def _pairs(pool: Sequence[Member]) -> list[tuple[Member, Member]]:
    """As many disjoint pairs with different answers as there are: always from the two answers with most left."""
    answers: dict[str, list[Member]] = {}
    for member in _shuffled(pool):
        answers.setdefault(member.answer, []).append(member)
    left = [(-len(members), answer) for answer, members in answers.items()]
    heapify(left)
    pairs: list[tuple[Member, Member]] = []
    while len(left) > 1:
        fullest = [heappop(left)[1] for _ in range(2)]
        pairs.append((answers[fullest[0]].pop(), answers[fullest[1]].pop()))
        for answer in fullest:
            if answers[answer]:
                heappush(left, (-len(answers[answer]), answer))
    return pairs


def _third(member: Member, donor: Member, order: Sequence[Member]) -> int | None:
    """A sample of another group if there is one, whose answer is not the donor's."""
    place = zlib.crc32(member.id.encode()) % len(order)
    looked_at = (order[(place + n) % len(order)] for n in range(min(len(order), LOOKED_AT)))
    others = [
        other
        for other in looked_at
        if other.answer != donor.answer and other.number not in (member.number, donor.number)
    ]
    return next((o.number for o in others if o.group != member.group), others[0].number if others else None)
