"""Files compressed with zstd, of one frame or several; one that ends within a frame is an error."""

from __future__ import annotations

import io
from typing import Any, BinaryIO

_CHUNK = 4096
"""Compressed bytes at a time; hostile ones may become 128 MB."""


class ZstdReader(io.RawIOBase):
    """Unpacks `file` while it is read.

    The library's own stream reader takes a file that was cut off for one that ends. Raises EOFError there, and what the
    library raises for damaged data.
    """

    def __init__(self, file: BinaryIO) -> None:
        import zstandard

        self._file, self._library = file, zstandard
        self._frame: Any = None
        self._packed = self._plain = b""

    def readable(self) -> bool:
        """True."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Fill `buffer` as far as one step goes; 0 at the end."""
        while not self._plain:
            self._packed = self._packed or self._file.read(_CHUNK)
            if not self._packed:
                if self._frame is not None:
                    raise EOFError("it ends within compressed data")
                return 0
            self._frame = self._frame or self._library.ZstdDecompressor().decompressobj()
            self._plain = self._frame.decompress(self._packed)
            self._packed = self._frame.unused_data if self._frame.eof else b""
            self._frame = None if self._frame.eof else self._frame
        count = min(len(buffer), len(self._plain))
        buffer[:count], self._plain = self._plain[:count], self._plain[count:]
        return count
