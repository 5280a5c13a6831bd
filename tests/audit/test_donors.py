from __future__ import annotations

import random
import time
from collections import Counter

from ilvr_ds.audit.donors import Member, find_swaps, next_members


def members(answers: str, question: str = "q", group: str = "g", start: int = 0) -> list[Member]:
    return [
        Member(number, f"{group}-{number}", question, group, answer) for number, answer in enumerate(answers, start)
    ]


def test_pairs_are_disjoint_mutual_and_of_different_answers() -> None:
    pool = members("AAAABBCCD" * 5)
    swaps = find_swaps(pool)
    answers = {member.number: member.answer for member in pool}
    assert len(swaps) == 44, "45 samples, and no answer is more than half of them"
    for number, swap in swaps.items():
        assert swaps[swap.donor].donor == number and swap.same_words
        assert answers[swap.donor] != answers[number]
        assert swap.unrelated not in (None, number, swap.donor)
        assert answers[swap.unrelated or 0] != answers[swap.donor]


def test_an_answer_that_most_have_leaves_the_rest_without_a_partner() -> None:
    assert len(find_swaps(members("AAAAAAAB"))) == 2
    assert find_swaps(members("AAAA")) == {}


def test_pairs_do_not_depend_on_the_order_of_the_data() -> None:
    pool = members("ABCD" * 6) + members("AB" * 3, "other", start=24)
    mixed = random.Random(0).sample(pool, len(pool))
    assert find_swaps(pool) == find_swaps(mixed)
    assert next_members(pool, False) == next_members(mixed, False)


def test_many_answers_are_paired_in_no_time() -> None:
    pool = [Member(number, f"{number}", "q", "g", f"{number}") for number in range(20_000)]
    started = time.process_time()
    assert len(find_swaps(pool)) == 20_000
    assert time.process_time() - started < 10


def test_other_words_are_paired_within_a_group_alone() -> None:
    pool = members("A", "one") + members("B", "two", start=1) + members("C", "three", group="h", start=2)
    swaps = find_swaps(pool)
    assert set(swaps) == {0, 1} and not swaps[0].same_words
    assert swaps[0].unrelated == swaps[1].unrelated == 2, "a third sample of another group"


def test_the_next_sample_gives_to_one_sample_and_takes_from_one() -> None:
    pool = members("ABCD" * 5) + members("AB", group="h", start=20) + members("A", group="alone", start=22)
    for within_group in (False, True):
        following = next_members(pool, within_group)
        assert max(Counter(following.values()).values()) == 1
        assert all(number != after for number, after in following.items())
    groups = {member.number: member.group for member in pool}
    assert all(after is None or groups[after] == groups[number] for number, after in following.items())
    assert following[22] is None
