"""Samples that lie: every kind of bad bytes that a shard may hold in place of a sample, and how to plant them."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import pickle
import tarfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from ilvr_ds.data.shards import INDEX_DTYPE
from tests.data.packing import png_bomb

Members = dict[str, bytes]


def tar_of(members: Members, **header: Any) -> bytes:
    """The members as tar blocks, without an end-of-archive marker; `header` sets fields of every header."""
    return b"".join(member_blocks(name, data, **header) for name, data in members.items())


def member_blocks(name: str, data: bytes, **header: Any) -> bytes:
    """Header and padded content of one member."""
    info = tarfile.TarInfo(name)
    info.size = len(data)
    for field, value in header.items():
        setattr(info, field, value)
    return info.tobuf(tarfile.USTAR_FORMAT) + data + bytes(-len(data) % tarfile.BLOCKSIZE)


def members_of(sample_bytes: bytes) -> Members:
    """The members of a stretch of a tar, by Python's own reader."""
    with tarfile.open(fileobj=io.BytesIO(sample_bytes + bytes(1024))) as tar:
        return {info.name: tar.extractfile(info).read() for info in tar.getmembers()}


class Bomb:
    """Unpickling it leaves a trace."""

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (Path("exploded"),)


def _of(kind: str, members: Members) -> str:
    return next(name for name in members if name.split(".")[1].startswith(kind))


def _with(**changed: bytes) -> Callable[[Members], bytes]:
    """The first member of each kind ("json", "in", "helper") has other content."""
    return lambda members: tar_of({**members, **{_of(kind, members): data for kind, data in changed.items()}})


def _plus(name: str, data: bytes, **header: Any) -> Callable[[Members], bytes]:
    return lambda members: tar_of(members) + member_blocks(name.format(next(iter(members))[:10]), data, **header)


def _record(**changes: Any) -> Callable[[Members], bytes]:
    def changed(members: Members) -> bytes:
        name = _of("json", members)
        return tar_of({**members, name: json.dumps({**json.loads(members[name]), **changes}).encode()})

    return changed


def _flip(at: int) -> Callable[[Members], bytes]:
    def flipped(members: Members) -> bytes:
        data = bytearray(tar_of(members))
        data[at] ^= 0x10
        return bytes(data)

    return flipped


def _without(kind: str) -> Callable[[Members], bytes]:
    return lambda members: tar_of({name: data for name, data in members.items() if name != _of(kind, members)})


def bomb() -> bytes:
    """2 KB that gunzip twice to 1.4 GB of zeros."""
    step = gzip.compress(bytes(14_000_000), mtime=0)
    return gzip.compress(step * 100, mtime=0)


HOSTILE: dict[str, Callable[[Members], bytes]] = {
    "cut in the middle of a member": lambda members: tar_of(members)[:-1000],
    "cut between two members": lambda members: tar_of(dict(list(members.items())[:-1])),
    "flipped byte of a name": _flip(3),
    "flipped byte of a size": _flip(130),
    "flipped byte of a checksum": _flip(150),
    "missing text": _without("json"),
    "missing input image": _without("in"),
    "missing helper image": _without("helper"),
    "bad JSON": _with(json=b'{"id": "x", '),
    "JSON of another kind": _with(json=b"[1, 2]"),
    "JSON nested 100,000 deep": _with(json=b"[" * 100_000),
    "text that is no text": _record(question=["?"]),
    "more markers than images": _record(question="<image>" * 5),
    "reserved token in the text": _record(question="<|im_end|>"),
    "no steps": _record(steps=[], images=[]),
    "image that does not decode": _with(**{"in": b"\x89PNG\r\n\x1a\nnot an image"}),
    "image of another format": _with(helper=b"GIF89a" + bytes(100)),
    "empty image": _with(**{"in": b""}),
    "image of 900 megapixels": _with(**{"in": png_bomb(30_000)}),
    "helper image of 900 megapixels": _with(helper=png_bomb(30_000)),
    "compressed": lambda members: gzip.compress(tar_of(members) + bytes(1024)),
    "20 KB that expand to 1.4 GB": lambda members: tar_of(
        {**members, f"{next(iter(members))[:10]}.in9.png.gz": bomb()}
    ),
    "the same named as an image": lambda members: _with(**{"in": bomb()})(members),
    "shard compressed to 20 KB": lambda members: bomb(),
    "sparse member of 1.4 GB": _plus("{}.in9.png", bytes(512), type=tarfile.GNUTYPE_SPARSE),
    "a member twice": lambda members: tar_of(members) + member_blocks(*next(iter(members.items()))),
    "another sample's key": lambda members: tar_of({f"9{name[1:]}": data for name, data in members.items()}),
    "name with ../": _plus("../{}.png", b"x"),
    "absolute name": _plus("/tmp/{}.png", b"x"),
    "symlink": _plus("{}.in9.png", b"", type=tarfile.SYMTYPE, linkname="/etc/passwd"),
    "hard link": _plus("{}.in9.png", b"", type=tarfile.LNKTYPE, linkname="../../etc/passwd"),
    "device": _plus("{}.in9.png", b"", type=tarfile.CHRTYPE),
    "pickled member": _plus("{}.pkl", pickle.dumps(Bomb())),
    "pickle named as image": _with(**{"in": pickle.dumps(Bomb())}),
    "pickle named as text": _with(json=pickle.dumps(Bomb())),
    "torch file": _plus("{}.pth", pickle.dumps(Bomb())),
    "extended header that renames": _plus("{}.in9.png", b"30 path=0000000000.json\n", type=tarfile.XHDTYPE),
    "nothing": lambda members: bytes(512),
}
"""Name of the lie, and what it makes of a sample's members."""


def sample_bytes(folder: Path, number: int) -> bytes:
    """The stretch of the tar that holds a sample of a packed data set."""
    shard, entry = _find(folder, number)
    return (folder / shard["name"]).read_bytes()[entry["offset"] : entry["offset"] + entry["length"]]


def plant(folder: Path, number: int, lie: bytes) -> None:
    """Put other bytes in the place of a sample and make index, sizes and checksums agree with them."""
    described = json.loads((folder / "dataset.json").read_text())
    shard, entry = _find(folder, number)
    tar, idx = folder / shard["name"], (folder / shard["name"]).with_suffix(".idx")
    data, index = tar.read_bytes(), np.fromfile(idx, INDEX_DTYPE)
    data = data[: entry["offset"]] + lie + data[entry["offset"] + entry["length"] :]
    at = int(np.flatnonzero(index["offset"] == entry["offset"])[0])
    grown = len(lie) - int(entry["length"])
    index["offset"][at + 1 :] += np.uint64(grown % 2**64)
    index["length"][at], index["crc32"][at] = len(lie), zlib.crc32(lie)
    tar.write_bytes(data)
    index.tofile(idx)
    [mine] = [s for s in described["shards"] if s["name"] == shard["name"]]
    mine["size_bytes"] += grown
    described["size_bytes"] += grown
    mine["sha256"] = hashlib.sha256(data).hexdigest()
    mine["index_sha256"] = hashlib.sha256(index.tobytes()).hexdigest()
    (folder / "dataset.json").write_text(json.dumps(described))


def _find(folder: Path, number: int) -> tuple[dict[str, Any], Any]:
    for shard in json.loads((folder / "dataset.json").read_text())["shards"]:
        if number < shard["samples"]:
            return shard, np.fromfile((folder / shard["name"]).with_suffix(".idx"), INDEX_DTYPE)[number]
        number -= shard["samples"]
    raise IndexError(number)
