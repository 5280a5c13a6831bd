"""Byte ranges from folders and web servers."""

import errno
import multiprocessing
import pickle
from pathlib import Path

import pytest

from ilvr_ds.data import storage
from ilvr_ds.data.storage import HttpFolder, LocalFolder, open_storage
from ilvr_ds.errors import UserError
from tests.data.packing import serve


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "a.tar").write_bytes(bytes(range(200)))
    return tmp_path


def test_local_ranges(folder):
    files = open_storage(str(folder))
    assert files.read_range("a.tar", 10, 3) == bytes([10, 11, 12])
    assert files.read_range("a.tar", 10, 0) == b""
    assert files.read("a.tar") == bytes(range(200)) and files.size("a.tar") == 200
    with pytest.raises(UserError, match=r"a.tar: ends at byte 200, 5 bytes too early"):
        files.read_range("a.tar", 195, 10)
    with pytest.raises(UserError, match=r"b.tar: cannot be read"):
        files.read_range("b.tar", 0, 1)


def test_a_relative_path_stays_where_it_was(folder, monkeypatch):
    monkeypatch.chdir(folder)
    files = open_storage(".")
    monkeypatch.chdir("/")
    assert files.size("a.tar") == 200


def test_few_files_stay_open(folder, monkeypatch):
    monkeypatch.setattr(storage, "MAX_OPEN_FILES", 2)
    files = LocalFolder(folder)
    for n in range(3):
        (folder / f"{n}").write_bytes(bytes([n]))
    for n in (0, 1, 0, 2):
        assert files.read_range(f"{n}", 0, 1) == bytes([n])
    assert list(files._files) == ["0", "2"], "the file that was not used for longest is closed"


def test_pickled_storages_open_their_own_files(folder):
    with serve(folder) as (address, _):
        for files in (LocalFolder(folder), HttpFolder(address)):
            files.read_range("a.tar", 0, 1)
            assert pickle.loads(pickle.dumps(files)).read_range("a.tar", 5, 1) == b"\5"


def test_forked_processes_share_no_connection(folder):
    with serve(folder) as (address, _):
        files = HttpFolder(address)
        files.read_range("a.tar", 0, 1)
        ours = files._session
        receive, send = multiprocessing.Pipe(duplex=False)

        def child() -> None:
            send.send((files.read_range("a.tar", 7, 2), files._session is ours))

        process = multiprocessing.get_context("fork").Process(target=child)
        process.start()
        assert receive.poll(30)
        assert receive.recv() == (b"\7\10", False)
        process.join()


def test_http_ranges(folder):
    with serve(folder) as (address, handler):
        files = open_storage(address + "/")
        assert files.read_range("a.tar", 10, 3) == bytes([10, 11, 12])
        assert handler.requests == [("/a.tar", "bytes=10-12")]
        assert files.read("a.tar") == bytes(range(200)) and files.size("a.tar") == 200


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("whole", "the server ignores range requests"),
        ("endless", "the server ignores range requests"),  # told before the terabyte has come
        ("short", "asked for 3 bytes at 10, the server sent 2"),
        ("404", "the server has no such file"),
        ("403", "the server answers 403"),
        ("416", "is shorter than byte 10"),
        ("shifted", r"asked for bytes=10-12, the server sends 'bytes 11-13/200'"),
    ],
)
def test_http_answers_that_are_not_the_range(folder, fault, message):
    with serve(folder, fault) as (address, _), pytest.raises(UserError, match=f"{address}/a.tar: {message}"):
        open_storage(address).read_range("a.tar", 10, 3)


@pytest.mark.parametrize("faults", [["503"], ["cut"], ["503", "cut"]])
def test_passing_faults_are_tried_again(folder, faults, monkeypatch):
    monkeypatch.setattr(storage, "PAUSES_S", (0.01,) * 3)
    with serve(folder, *faults) as (address, handler):
        assert open_storage(address).read_range("a.tar", 10, 8) == bytes(range(10, 18))
        assert len(handler.requests) == len(faults) + 1


def test_lasting_faults_end(folder, monkeypatch):
    monkeypatch.setattr(storage, "PAUSES_S", (0.01,))
    with serve(folder, *["cut"] * 9) as (address, handler):
        with pytest.raises(UserError, match=r"the answer broke off \(ChunkedEncodingError\), after several tries"):
            open_storage(address).read_range("a.tar", 10, 8)
        assert len(handler.requests) == 2
        handler.faults[:] = ["503"] * 9
        with pytest.raises(UserError, match=r"the server answers 503 .*, after several tries"):
            open_storage(address).read_range("a.tar", 10, 8)
    with pytest.raises(UserError, match=r"a.tar: no answer from the server \(ConnectionError\), after several tries"):
        open_storage(address).read_range("a.tar", 10, 8)


def test_secrets_in_an_address_are_used_but_not_shown(folder):
    with serve(folder) as (address, handler):
        files = open_storage(address.replace("//", "//me:word@") + "?sig=secret")
        assert files.label == address
        files.read_range("a.tar", 0, 1)
        assert handler.requests == [("/a.tar?sig=secret", "bytes=0-0")]


@pytest.mark.parametrize(("times", "outcome"), [(2, "read"), (9, "given up")])
def test_a_stale_handle_is_opened_anew(folder, monkeypatch, times, outcome):
    """A network file system whose server restarted: catches a try that goes on with the same handle."""
    monkeypatch.setattr(storage, "PAUSES_S", (0.01,) * 5)
    files, stale, pread = LocalFolder(folder), [], storage.os.pread

    def failing(handle, length, offset):
        if len(stale) < times:
            stale.append(next(iter(files._files.values())))
            raise OSError(errno.ESTALE, "Stale file handle")
        return pread(handle, length, offset)

    monkeypatch.setattr(storage.os, "pread", failing)
    if outcome == "read":
        assert files.read_range("a.tar", 10, 3) == bytes([10, 11, 12])
        assert files.retries == times
    else:
        with pytest.raises(UserError, match=r"a.tar: cannot be read \(Stale file handle\)"):
            files.read_range("a.tar", 10, 3)
        assert files.retries == storage.RETRIES
    assert all(file.closed for file in stale[: storage.RETRIES])
    assert len(set(map(id, stale))) == len(stale)


def test_a_lasting_fault_of_a_disk_is_not_tried_again(folder):
    files = LocalFolder(folder)
    with pytest.raises(UserError, match=r"cannot be read \(Is a directory\)"):
        files.read_range(".", 0, 3)
    assert files.retries == 0
