"""A sample as members of a tar: `KEY.json`, `KEY.in0.png`, `KEY.helper0.jpg`, with nothing else allowed.

KEY is the sample's running number in the data set, ten digits. The JSON names every image member, so that a sample
that has lost a member is noticed.
"""

from __future__ import annotations

import json
import mmap
import re
import tarfile
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from ilvr_ds.data.check import check_sample
from ilvr_ds.data.sample import LatentStep, Sample, SampleError, Step, TextStep, Turn
from ilvr_ds.errors import OneLineError

BLOCK = tarfile.BLOCKSIZE
END_OF_ARCHIVE = bytes(2 * BLOCK)
SAMPLE_BYTES_LIMIT = 1024 * 1024 * 1024

_NAME = re.compile(r"(\d{10})\.(json|(?:in|helper)(?:0|[1-9]\d{0,3})\.(?:png|jpg|webp))", re.ASCII)
_MAGIC = {"png": rb"\x89PNG\r\n\x1a\n", "jpg": rb"\xff\xd8\xff", "webp": rb"RIFF....WEBP"}
_SIZE, _CHECKSUM = re.compile(rb"[0-7]{11}\0"), re.compile(rb"[0-7]{6}\0 ")
"""Of a header, as tarfile writes them"""


class MemberError(OneLineError):
    """The bytes of a tar are not what was written; the message says why in one line."""


@dataclass(frozen=True)
class Member:
    """Where a member of a tar lies: `start` of its header and `size` of its content, in bytes."""

    name: str
    start: int
    size: int

    @property
    def key(self) -> str:
        """The sample that it belongs to."""
        return self.name.partition(".")[0]

    @property
    def extension(self) -> str:
        """What its name says besides: "json", "in0.png", ..."""
        return self.name.partition(".")[2]

    @property
    def content(self) -> slice:
        """Its bytes in the tar."""
        return slice(self.start + BLOCK, self.start + BLOCK + self.size)

    @property
    def end(self) -> int:
        """The end of its padding."""
        return self.start + BLOCK + -(-self.size // BLOCK) * BLOCK


def key_of(number: int) -> str:
    """KEY of the sample with this running number."""
    return f"{number:010d}"


def encode_members(sample: Sample) -> dict[str, bytes]:
    """The members of a sample by extension ("json", "in0.png", ...).

    Raises SampleError where the sample's parts do not fit together, it is too large, an image is of another kind or
    text is not valid Unicode.
    """
    check_sample(sample)
    images = {"in": sample.input_images, "helper": sample.helper_images}
    members = {f"{kind}{i}.{_extension(d)}": d for kind, data in images.items() for i, d in enumerate(data)}
    record: dict[str, Any] = {
        "id": sample.id,
        "question": sample.question,
        "steps": [_step_record(step) for step in sample.steps],
        "answer": sample.answer,
        "group": sample.group,
        "meta": sample.meta,
        "images": list(members),
    }
    if sample.history:
        record["history"] = [{"role": turn.role, "content": turn.text} for turn in sample.history]
    members["json"] = json.dumps(record, ensure_ascii=False, separators=(",", ":")).encode()
    if any(not _NAME.fullmatch(f"{key_of(0)}.{extension}") for extension in members):
        raise SampleError("more than 10,000 images")
    if (size := sum(map(len, members.values()))) > SAMPLE_BYTES_LIMIT:
        raise SampleError(f"the sample has {size} bytes, the limit is {SAMPLE_BYTES_LIMIT}")
    return members


def decode_members(data: bytes, key: str) -> Sample:
    """The sample whose members are `data`, a stretch of a tar; raises MemberError where anything is wrong.

    webdataset's own reader is not used: it inflates compressed data, expands sparse files and ends quietly at a damaged
    header. Nothing but JSON is decoded.
    """
    found = walk_members(data)
    keys = {member.key for member in found}
    if keys != {key} or found[-1].end != len(data):
        raise MemberError(f"the bytes hold {', '.join(sorted(keys)) or 'nothing'}, expected one whole sample")
    members = {member.extension: data[member.content] for member in found}
    if len(members) < len(found):
        raise MemberError("two members have one name")
    if "json" not in members:
        raise MemberError("the member with the text is missing")
    try:
        record = json.loads(members.pop("json"))
        if sorted(record["images"]) != sorted(members):
            raise MemberError(f"images {', '.join(record['images'])} expected, found {', '.join(members)}")
        return _sample(record, {name: members[name] for name in record["images"]})
    except (KeyError, TypeError, AttributeError, RecursionError, ValueError) as error:
        raise MemberError(f"the text of the sample is damaged ({error})") from error


def walk_members(data: bytes | mmap.mmap) -> list[Member]:
    """The members of a tar up to its first empty block or the end of `data`.

    Raises MemberError for a damaged header, a member that is cut off and one that is not allowed.
    """
    members: list[Member] = []
    start = 0
    while start < len(data):
        header = data[start : start + BLOCK]
        if not any(header):
            break
        try:
            kind, name, size = _parse_header(header)
        except (tarfile.HeaderError, ValueError) as error:
            raise MemberError(f"damaged header at byte {start} ({error})") from error
        if kind != tarfile.REGTYPE or not _NAME.fullmatch(name):
            raise MemberError(f"member {name!r} at byte {start} is not allowed")
        member = Member(name, start, size)
        if size < 0 or member.end > len(data):
            raise MemberError(f"member {name} at byte {start} is cut off")
        members.append(member)
        start = member.end
    return members


def _parse_header(header: bytes) -> tuple[bytes, str, int]:
    """Type, name and size of a member, as tarfile finds them; raises what tarfile does.

    Members of one kind differ in key, size and checksum: where these three, and no folder, are written in the usual
    way, the rest of the header has been parsed before.
    """
    key, size, checksum = header[:10], header[124:136], header[148:156]
    is_usual = key.isdigit() and _SIZE.fullmatch(size) and _CHECKSUM.fullmatch(checksum)
    if is_usual and len(header) == BLOCK and header[345] == 0 and int(checksum[:6], 8) == _sum_of(header):
        kind, extension = _parse_rest(header[10:124], header[136:148], header[156:])
        return kind, key.decode() + extension, int(size[:11], 8)
    info = tarfile.TarInfo.frombuf(header, "ascii", "strict")
    return info.type, info.name, info.size


@lru_cache(maxsize=1024)
def _parse_rest(before: bytes, between: bytes, behind: bytes) -> tuple[bytes, str]:
    """Type, and name behind the key, of a header whose parts before, between and behind size and checksum these are."""
    key = b"0" * 10
    header = key + before + b"0" * 11 + b"\0" + between + bytes(8) + behind
    header = header[:148] + b"%06o\0 " % _sum_of(header) + header[156:]
    info = tarfile.TarInfo.frombuf(header, "ascii", "strict")
    return info.type, info.name[len(key) :]


def _sum_of(header: bytes) -> int:
    """The checksum that belongs in a header: its own eight bytes count as blanks."""
    return sum(header) - sum(header[148:156]) + 8 * ord(" ")


def _step_record(step: Step) -> dict[str, Any]:
    if isinstance(step, TextStep):
        return {"type": "text", "content": step.content}
    return {"type": "latent"} if step.region is None else {"type": "latent", "region": list(step.region)}


def _sample(record: dict[str, Any], images: dict[str, bytes]) -> Sample:
    helpers = 0
    steps: list[Step] = []
    for step in record["steps"]:
        if step["type"] == "latent":
            steps.append(LatentStep(helpers, tuple(step["region"]) if "region" in step else None))
            helpers += 1
        else:
            steps.append(TextStep(step["content"]))
    sample = Sample(
        id=record["id"],
        question=record["question"],
        steps=tuple(steps),
        input_images=tuple(data for name, data in images.items() if name.startswith("in")),
        helper_images=tuple(data for name, data in images.items() if name.startswith("helper")),
        answer=record["answer"],
        group=record["group"],
        meta=dict(record["meta"]),
        history=tuple(Turn(turn["role"], turn["content"]) for turn in record.get("history", ())),
    )
    if not all(isinstance(text, str) for text in sample.texts):
        raise TypeError("a text is not text")
    check_sample(sample)
    return sample


def _extension(image: bytes) -> str:
    for extension, magic in _MAGIC.items():
        if re.match(magic, image, re.DOTALL):
            return extension
    raise SampleError("an image is neither JPEG, PNG nor WebP")
