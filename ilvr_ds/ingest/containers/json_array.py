"""A JSON array of records, read record by record: a file of gigabytes takes no more memory than its largest record."""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterator
from typing import BinaryIO

from ilvr_ds.errors import UserError
from ilvr_ds.ingest.containers.json_lines import parse_or_error
from ilvr_ds.ingest.containers.source import RECORD_BYTES_LIMIT, Entry

_CHUNK = 1024 * 1024
_BLANK = " \t\r\n"


def read_array(stream: BinaryIO, label: str) -> Iterator[Entry]:
    """The records of the array, numbered from 1.

    Raises UserError where the text between records is no JSON array, with the number of the record: unlike in JSON
    Lines nothing says where the next one begins.
    """
    text = _Text(stream, label)
    text.expect("[", 1)
    number = 0
    while text.next_letter() != "]":
        number += 1
        yield Entry(number, parse_or_error(text.value(number)))
        if text.next_letter() != "]":
            text.expect(",", number)
            if text.next_letter() == "]":
                raise text.error(number, "a comma without a record behind it")
    text.expect("]", number)
    if text.next_letter():
        raise text.error(number, "text behind the end of the array")


class _Text:
    """A stretch of the file and a place in it."""

    def __init__(self, stream: BinaryIO, label: str) -> None:
        self._stream, self._label = stream, label
        self._decoder = codecs.getincrementaldecoder("utf-8-sig")()
        self._json = json.JSONDecoder()
        self._text, self._place, self._ended = "", 0, False

    def error(self, number: int, what: str) -> UserError:
        return UserError(f"{self._label}: record {number} of the array: {what}")

    def next_letter(self) -> str:
        """The next letter that is not blank, which is not consumed; "" at the end."""
        while True:
            while self._place < len(self._text) and self._text[self._place] in _BLANK:
                self._place += 1
            if self._place < len(self._text) or not self._more(_CHUNK):
                return self._text[self._place : self._place + 1]

    def expect(self, letter: str, number: int) -> None:
        """Consume `letter`."""
        if (found := self.next_letter()) != letter:
            raise self.error(number, f"expected '{letter}', found {repr(found) if found else 'the end of the file'}")
        self._place += 1

    def value(self, number: int) -> str:
        """The text of the next value. It is whole only once a letter stands behind it: 1 may be the begin of 12."""
        self.next_letter()
        step = _CHUNK
        while True:
            try:
                _, end = self._json.raw_decode(self._text, self._place)
            except (ValueError, RecursionError) as error:
                problem: str | None = f"not valid JSON ({error})"
            else:
                problem = None
                if end < len(self._text) or self._ended:
                    value, self._place = self._text[self._place : end], end
                    return value
            if len(self._text) - self._place > RECORD_BYTES_LIMIT:
                raise self.error(number, problem or f"more than {RECORD_BYTES_LIMIT} letters")
            if not self._more(step) and problem:
                raise self.error(number, problem)
            step *= 2  # a long record is parsed few times

    def _more(self, size: int) -> bool:
        """Read on, forgetting what was consumed; False at the end of the file."""
        if self._ended:
            return False
        data = self._stream.read(size)
        self._ended = not data
        try:
            self._text = self._text[self._place :] + self._decoder.decode(data, final=self._ended)
        except UnicodeDecodeError as error:
            raise UserError(f"{self._label}: the text is not UTF-8 ({error.reason})") from error
        self._place = 0
        return True
