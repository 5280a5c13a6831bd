"""Counting and listing bad samples, and when they are too many."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from ilvr_ds.data.window import BadSample
from ilvr_ds.errors import UserError
from ilvr_ds.training.quarantine import EACH_ALONE, SHOWN, Quarantine
from tests.full_disk import files_end_at


def bad(number: int) -> BadSample:
    return BadSample(number, f"id-{number}", "shard-000000.tar", 512 * number, f"reason {number}")


class Shards(SimpleNamespace):
    """What a Quarantine asks of a data set."""

    def __len__(self) -> int:
        return self.samples


def quarantine(
    folder: Path, fraction: float = 0.01, samples: int = 10**6, data: str = "abc", **more: Any
) -> Quarantine:
    shards: Any = Shards(samples=samples, location="where", fingerprint=data)
    return Quarantine(folder, shards, fraction, **{"is_writer": True, **more})


def listed(folder: Path) -> list[int]:
    return [json.loads(line)["number"] for line in (folder / "quarantine.jsonl").read_text().splitlines()]


def test_each_sample_is_listed_once_and_counted_each_time(tmp_path: Path) -> None:
    one = quarantine(tmp_path)
    one.add([bad(3), bad(4)], 16, retries=2)
    one.add([bad(3)], 16, retries=0)
    assert listed(tmp_path) == [3, 4]
    assert one.metrics() == {"data/skipped": 3, "data/retries": 2}


def test_a_run_that_goes_on_lists_only_what_is_new(tmp_path: Path) -> None:
    one = quarantine(tmp_path)
    one.add([bad(3)], 16, 1)
    with (tmp_path / "quarantine.jsonl").open("a") as file:
        file.write('{"number": 9, "da')  # the process was killed here
    two = quarantine(tmp_path)
    two.load_state_dict(one.state_dict())
    two.add([bad(3), bad(5)], 16, 0)
    assert listed(tmp_path) == [3, 5]
    assert two.skipped == 3 and two.retries == 1


def test_another_data_set_has_its_own_numbers(tmp_path: Path) -> None:
    quarantine(tmp_path).add([bad(3)], 16, 0)
    quarantine(tmp_path, data="def").add([bad(3)], 16, 0)
    assert listed(tmp_path) == [3, 3]


def test_other_ranks_count_but_write_nothing(tmp_path: Path) -> None:
    one = quarantine(tmp_path, is_writer=False)
    one.add([bad(3)], 16, 0)
    assert one.skipped == 1 and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("fraction", "samples", "steps", "ends_after"),
    [
        (0.0, 10**6, [0, 0, 1], 3),  # at the first
        (0.01, 10**6, [10, 1], 2),  # 11 of the first 200: more than 1 % of 1,000
        (0.01, 10**6, [1] * 50, None),  # 1 % of everything: never more than 10 of 1,000
        (0.01, 10**6, [0] * 500 + [6, 6], 502),  # a sound past of 50,000 samples does not excuse what happens now
        (0.01, 10**6, [5, *[0] * 30, 6, *[0] * 30, 5], None),  # far apart
        (0.1, 150, [8, 13], 2),  # of a small data set
        (1.0, 64, [100] * 3, None),
    ],
)
def test_the_fraction_is_that_of_the_last_samples(
    fraction: float, samples: int, steps: list[int], ends_after: int | None, tmp_path: Path
) -> None:
    one = quarantine(tmp_path, fraction, samples)
    ended = None
    for step, count in enumerate(steps, start=1):
        one.add([bad(100 * step + i) for i in range(count)], 100, 0)
        try:
            one.check()
        except UserError as error:
            assert f"the last: reason {100 * step + count - 1}" in str(error)
            ended = ended or step
    assert ended == ends_after


@pytest.mark.parametrize(("count", "is_refused"), [(5, False), (6, True)])
def test_each_evaluation_is_judged_alone(tmp_path: Path, count: int, is_refused: bool) -> None:
    """Of a large set, of which a part is evaluated. Catches samples that are counted once more at each evaluation, and
    ones that are excused by those which are not looked at."""
    one = quarantine(tmp_path, samples=5_000, judged=EACH_ALONE)
    for _ in range(4):
        one.add([bad(number) for number in range(count)], 512, 0)
        assert one.exceeded == is_refused
    if is_refused:
        with pytest.raises(
            UserError, match=r"6 of the last 512 samples of where could not be used, more than 0\.01 of 512;"
        ):
            one.check()
    else:
        one.check()


def test_only_the_first_are_shown_in_the_log(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    one = quarantine(tmp_path)
    one.add([bad(number) for number in range(100)], 1000, 0)
    assert len(caplog.messages) == SHOWN + 1
    assert caplog.messages[0] == "sample 0 is replaced by a stand-in: reason 0"
    assert "all are listed in" in caplog.messages[-1]


def test_a_full_disk_does_not_end_the_run(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Catches a list that is written without asking whether it can be, and samples that it forgets."""
    one = quarantine(tmp_path)
    one.add([bad(3)], 16, 0)
    with files_end_at((tmp_path / "quarantine.jsonl").stat().st_size + 10):
        one.add([bad(4)], 16, 0)
        one.add([bad(4), bad(5)], 16, 0)
        assert listed(tmp_path) == [3]
    one.add([], 16, 0)
    assert listed(tmp_path) == [3, 4, 5]
    with files_end_at((tmp_path / "quarantine.jsonl").stat().st_size):
        one.add([bad(6)], 16, 0)
    one.close()
    assert listed(tmp_path) == [3, 4, 5, 6]
    assert one.skipped == 5
    assert caplog.text.count("training goes on") == 2
