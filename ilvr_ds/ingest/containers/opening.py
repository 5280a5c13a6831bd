"""Finds out what an input is: by its first bytes, unpacked if it is compressed, or by what lies in the folder."""

from __future__ import annotations

import gzip
import io
import re
import zlib
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import BinaryIO, cast

from ilvr_ds.errors import UserError, counted
from ilvr_ds.ingest.containers.json_array import read_array
from ilvr_ds.ingest.containers.json_lines import read_lines
from ilvr_ds.ingest.containers.source import Entry, Source, Unit, missing_library
from ilvr_ds.ingest.containers.tables import HUB, open_dataset, read_parquet
from ilvr_ds.ingest.containers.tars import by_numbers, read_tar
from ilvr_ds.ingest.containers.zstd import ZstdReader
from ilvr_ds.ingest.foreign import HEAD, is_array, refuse_content, refuse_folder

_GZIP, _ZSTD, _PARQUET = b"\x1f\x8b", b"\x28\xb5\x2f\xfd", b"PAR1"
_TAR, _TAR_AT = b"ustar", 257
_PACKED_TARS = ("*.tar.gz", "*.tgz", "*.tar.zst")
_SPLIT = re.compile(r"(?<![a-z])(?:train|val|valid|validation|dev|test|eval)(?![a-z])", re.IGNORECASE)
_UNITS: dict[str, Unit] = {"JSON Lines": "line", "a JSON array": "record", "a webdataset tar": "sample"}


def open_source(input: Path | str, subset: str | None = None, split: str | None = None) -> Source:
    """The records of a file, a folder or `hf:OWNER/NAME`.

    `subset` and `split` are for data sets read by `datasets`, and refused for others. Raises UserError where the
    input is something else, and where it cannot be read.
    """
    name, path = str(input), Path(input)
    if name.startswith(HUB):
        return open_dataset(name, subset, split)
    if path.is_dir():
        refuse_folder(path)
        tars = sorted(path.glob("*.tar"), key=lambda tar: by_numbers(tar.name))
        packed = sorted(found.name for pattern in _PACKED_TARS for found in path.glob(pattern))
        if tars and packed:
            raise UserError(
                f"{path}: holds {tars[0].name} and, compressed, {packed[0]}, which would be left out; unpack it (to "
                ".tar), or move it away"
            )
        if tars and (subset is not None or split is not None):
            raise UserError(
                f"{path}: it holds tars, which --subset and --split do not choose from; "
                "give one tar, or a folder with those wanted"
            )
        return _open_tars(path, tars) if tars else open_dataset(name, subset, split)
    if subset is not None or split is not None:
        raise UserError(f"{path}: --subset and --split are for data set folders and {HUB}OWNER/NAME")
    try:
        with path.open("rb") as file:
            head = file.read(HEAD)
    except OSError as error:
        raise UserError(f"{path}: cannot read the records ({error.strerror})") from error
    if head.startswith(_PARQUET):
        return Source(name, path.stem, "a parquet file", "row", lambda: read_parquet(path), {"file": path.name})
    return _open_stream(path, head)


def _open_tars(folder: Path, tars: list[Path]) -> Source:
    """The samples of all tars of a folder, numbered through; raises UserError where they are of several splits."""
    splits = {found[0].lower(): tar.name for tar in tars if (found := _SPLIT.search(tar.stem))}
    if len(splits) > 1:
        names = " and ".join(splits.values())
        raise UserError(f"{folder}: holds tars of several splits, {names}; put those of one into a folder of their own")

    def entries() -> Iterator[Entry]:
        whole = chain.from_iterable(_entries(tar, "", "a webdataset tar") for tar in tars)
        return (replace(entry, number=number) for number, entry in enumerate(whole, start=1))

    return Source(str(folder), folder.name, counted(len(tars), "webdataset tar"), "sample", entries)


def _open_stream(path: Path, head: bytes) -> Source:
    packing = "gzip" if head.startswith(_GZIP) else "zstd" if head.startswith(_ZSTD) else ""
    if packing:
        head = _unpacked_head(path, packing)
    if head[_TAR_AT:].startswith(_TAR):
        inside = "a webdataset tar"
    else:
        refuse_content(path, head)
        inside = "a JSON array" if is_array(head) else "JSON Lines"
    what = f"{inside}, compressed with {packing}" if packing else inside
    stem = Path(path.stem).stem if packing else path.stem
    return Source(str(path), stem, what, _UNITS[inside], lambda: _entries(path, packing, inside), {"file": path.name})


def _unpacked_head(path: Path, packing: str) -> bytes:
    with ExitStack() as stack:
        stream = _unpacked(path, packing, stack)
        try:
            return stream.read(HEAD)
        except _damage(packing) as error:
            raise UserError(f"{path}: the compressed data are damaged ({error})") from error


def _entries(path: Path, packing: str, inside: str) -> Iterator[Entry]:
    with ExitStack() as stack:
        stream = _unpacked(path, packing, stack)
        try:
            if inside == "JSON Lines":
                yield from read_lines(stream)
            elif inside == "a JSON array":
                yield from read_array(stream, str(path))
            else:
                yield from read_tar(stream, str(path))
        except _damage(packing) as error:
            raise UserError(f"{path}: the file cannot be read to its end ({error})") from error


def _unpacked(path: Path, packing: str, stack: ExitStack) -> BinaryIO:
    file = stack.enter_context(path.open("rb"))
    if packing == "gzip":
        return cast(BinaryIO, stack.enter_context(gzip.GzipFile(fileobj=file)))
    if packing != "zstd":
        return file
    try:
        return io.BufferedReader(ZstdReader(file))
    except ImportError as error:
        raise missing_library(str(path), "a file compressed with zstd", "zstandard") from error


def _damage(packing: str) -> tuple[type[Exception], ...]:
    """What reading a damaged file raises."""
    if packing != "zstd":
        return OSError, EOFError, zlib.error
    import zstandard

    return OSError, EOFError, zstandard.ZstdError
