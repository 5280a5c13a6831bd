"""Single samples by number, from disk and over http, whole and damaged."""

import pickle
from pathlib import Path

import pytest
from torch.utils.data import DataLoader

from ilvr_ds.data.reader import ShardReader
from ilvr_ds.data.sample import Sample
from ilvr_ds.data.shards import open_dataset
from ilvr_ds.errors import UserError
from tests.data.packing import make_dataset, serve


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "set"


def test_every_sample_in_packed_order_and_in_any_other(folder):
    made = make_dataset(folder)
    reader = ShardReader(open_dataset(folder))
    assert [reader.read(n) for n in range(10)] == made
    assert [reader.read(n) for n in (9, 0, 4, 3, 8)] == [made[n] for n in (9, 0, 4, 3, 8)]
    for outside in (-1, 10):
        with pytest.raises(IndexError):
            reader.read(outside)


class _Samples:
    """A map-style data set around a reader."""

    def __init__(self, reader: ShardReader) -> None:
        self.reader = reader

    def __getitem__(self, number: int) -> Sample:
        return self.reader.read(number)

    def __len__(self) -> int:
        return len(self.reader)


def test_in_worker_processes(folder):
    made = make_dataset(folder)
    reader = ShardReader(open_dataset(folder))
    reader.read(0)
    loader = DataLoader(_Samples(reader), batch_size=None, num_workers=2, multiprocessing_context="fork")
    assert list(loader) == made
    assert pickle.loads(pickle.dumps(reader)).read(7) == made[7]


def test_over_http(folder):
    made = make_dataset(folder)
    with serve(folder) as (address, handler):
        reader = ShardReader(open_dataset(address))
        handler.requests.clear()
        assert [reader.read(n) for n in (5, 9)] == [made[5], made[9]]
        assert [path for path, _ in handler.requests] == ["/shard-000001.tar", "/shard-000002.tar"]
        (folder / "shard-000001.tar").unlink()
        with pytest.raises(UserError, match=r"/shard-000001.tar: the server has no such file"):
            reader.read(5)


def test_a_server_without_ranges_is_noticed_on_opening(folder):
    make_dataset(folder)
    with serve(folder, *["whole"] * 20) as (address, _), pytest.raises(UserError, match=r"ignores range requests"):
        open_dataset(address)


def test_damage_after_opening_names_shard_and_key(folder):
    make_dataset(folder)
    reader = ShardReader(open_dataset(folder))
    tar = folder / "shard-000001.tar"
    data = tar.read_bytes()
    start = int(reader.shard_set.index[5]["offset"])
    flipped = bytearray(data)
    flipped[data.index(b"0000000005.in0", start)] ^= 1
    tar.write_bytes(flipped)
    with pytest.raises(UserError, match=r"set/shard-000001.tar: sample 0000000005: damaged header"):
        reader.read(5)
    assert reader.read(4).id == "sample-4"
    tar.write_bytes((folder / "shard-000000.tar").read_bytes())
    with pytest.raises(UserError, match=r"shard-000001.tar: sample 0000000004: .*0000000000"):
        reader.read(4)
    tar.write_bytes(data[: start + 100])
    with pytest.raises(UserError, match=r"shard-000001.tar: ends at byte"):
        reader.read(5)
