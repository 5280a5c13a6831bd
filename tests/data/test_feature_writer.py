"""Writing stored features: whole or not there, never of two makes in one folder."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ilvr_ds.data.feature_writer import FeatureWriter, SampleRows
from ilvr_ds.errors import UserError
from tests.data.packing import contents

NAMES = ["shard-000000", "shard-000001"]


def writer_of(folder: Path, **changes: Any) -> FeatureWriter:
    return FeatureWriter(folder, {"data": "d" * 64, "tower": "t" * 64, **changes}, 2, {"torch": "1"})


def samples(count: int) -> Iterator[SampleRows | None]:
    for number in range(count):
        rows = np.full((number + 2, 2), number, np.uint16)
        yield (rows[:2], rows[2:]) if number != 1 else None


def test_a_sample_that_cannot_be_used_has_no_rows(tmp_path: Path) -> None:
    shard = writer_of(tmp_path).write(NAMES[0], samples(3))
    assert (shard.samples, shard.rows, shard.unusable) == (3, 2 + 4, 1)
    assert (tmp_path / "shard-000000.rows").stat().st_size == 6 * 2 * 2


def test_the_description_comes_with_the_last_shard(tmp_path: Path) -> None:
    """Catches features that can be trained on while parts of them are missing."""
    writer = writer_of(tmp_path)
    writer.write(NAMES[1], samples(2))
    assert writer.finish(NAMES) is None and not (tmp_path / "features.json").exists()
    assert writer_of(tmp_path).finished(NAMES[0]) is None
    writer.write(NAMES[0], samples(3))
    assert writer.finish(NAMES) and (tmp_path / "features.json").exists()
    assert not list(tmp_path.glob("*partial*"))


def interrupted() -> Iterator[SampleRows | None]:
    yield from samples(2)
    raise KeyboardInterrupt


def test_an_interrupted_shard_is_not_there_and_is_written_anew(tmp_path: Path) -> None:
    writer_of(tmp_path / "whole").write(NAMES[0], samples(3))
    writer = writer_of(tmp_path / "parts")
    with pytest.raises(KeyboardInterrupt):
        writer.write(NAMES[0], interrupted())
    assert not contents(tmp_path / "parts")
    assert writer.finished(NAMES[0]) is None
    for kind in ("rows", "rowidx", "json"):
        (tmp_path / f"parts/shard-000000.{kind}.partial-0123abcd").write_text("what a killed process left")
    writer.write(NAMES[0], samples(3))
    assert contents(tmp_path / "parts") == contents(tmp_path / "whole")


@pytest.mark.parametrize("ends_first", ["the first", "the second"])
def test_two_that_write_one_shard_do_not_meet(
    ends_first: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Catches rows of zeros: one process cuts off what the other has written, and publishes it with its own sums."""
    writer_of(tmp_path / "whole").write(NAMES[0], samples(4))
    first, second = writer_of(tmp_path / "both"), writer_of(tmp_path / "both")

    def between(begun: Iterator[SampleRows | None], meanwhile: Callable[[], object]) -> Iterator[SampleRows | None]:
        yield from islice(begun, 2)
        meanwhile()
        yield from begun

    if ends_first == "the second":
        shard = first.write(NAMES[0], between(samples(4), lambda: second.write(NAMES[0], samples(4))))
        assert "shard-000000 was encoded by another process meanwhile" in caplog.text
        assert second.finished(NAMES[0]) == shard
    else:  # the second has begun when the first ends, and is killed
        killed = between(samples(4), lambda: first.write(NAMES[0], samples(4)))
        with pytest.raises(KeyboardInterrupt):
            second.write(NAMES[0], chain(islice(killed, 3), interrupted()))
    assert contents(tmp_path / "both") == contents(tmp_path / "whole")


@pytest.mark.parametrize("lost", ["shard-000000.rows", "shard-000000.rowidx", "shard-000000.json"])
def test_a_shard_that_lost_a_file_is_written_again(lost: str, tmp_path: Path) -> None:
    writer = writer_of(tmp_path)
    shard = writer.write(NAMES[0], samples(3))
    assert writer.finished(NAMES[0]) == shard
    (tmp_path / lost).unlink()
    assert writer.finished(NAMES[0]) is None


@pytest.mark.parametrize("key", ["data", "tower"])
def test_features_of_something_else_are_not_mixed_in(key: str, tmp_path: Path) -> None:
    writer_of(tmp_path).write(NAMES[0], samples(3))
    with pytest.raises(UserError, match=rf"holds features made with {key} = .*give another --output, or remove it"):
        writer_of(tmp_path, **{key: "o" * 64}).finished(NAMES[0])


def test_mistakes_are_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be created"):
        writer_of(tmp_path / "file" / "folder")
    (tmp_path / "shard-000000.json").write_text("{")
    with pytest.raises(UserError, match=r"shard-000000\.json: cannot be read .*remove it to have the shard encoded"):
        writer_of(tmp_path).finished(NAMES[0])
    (tmp_path / "shard-000001.rows").mkdir()
    with pytest.raises(UserError, match="cannot write shard-000001"):
        writer_of(tmp_path).write(NAMES[1], samples(1))
