"""Mutations of shards, samples, records and images, and judges that know what may come of them.

Each target takes a random generator, mutates something sound and reads it. It returns what came of it ("right" or
the kind of refusal), or lets an exception through: only UserError, SampleError and MemberError are ours.

    python -m tests.data.fuzzing --count 10000 --seed 1      # with a limit on the memory of the process
"""

from __future__ import annotations

import argparse
import io
import json
import random
import resource
import shutil
import tarfile
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

from ilvr_ds.data.check import check_sample
from ilvr_ds.data.loader import SequentialNumbers, WindowDataset
from ilvr_ds.data.members import MemberError, decode_members, encode_members, key_of
from ilvr_ds.data.reader import ShardReader
from ilvr_ds.data.sample import Sample, SampleError
from ilvr_ds.data.shards import build_index, open_dataset
from ilvr_ds.errors import UserError
from ilvr_ds.ingest.importers import Rejected
from tests.data.hostile import HOSTILE, Members, member_blocks, members_of, plant, sample_bytes
from tests.data.packing import contents, make_dataset, png_bomb
from tests.golden_set import golden_set
from tests.ingest.records import read_records

SAMPLES, PER_SHARD = 9, 3
MEMORY_BYTES = 1536 * 1024 * 1024
"""More than the process had before: an image of 64 megapixels takes 200 MB, while it is decoded up to four times that.
A bomb would take tens of gigabytes."""


class WrongError(AssertionError):
    """Something was accepted that is not what was written."""


class Fuzzer:
    """A sound data set, and targets that each try one mutation of it."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.sound = folder / "sound"
        self.samples = make_dataset(self.sound, SAMPLES, PER_SHARD)
        self.files = contents(self.sound)
        self.work = folder / "work"
        self.work.mkdir()
        golden = golden_set()
        self.encoder, self.collator = golden.encoder, golden.collator("right")
        self.images = [pictures(kind, size) for kind in ("PNG", "JPEG", "WEBP") for size in ((9, 7), (120, 90))]
        self.records = [line for line in (golden.folder / "TRAIN.jsonl").read_bytes().splitlines() if line]
        self.image_root = golden.folder
        self.targets: list[Callable[[random.Random], str]] = [
            self.shard_on_disk, self.window_of_a_changing_shard, self.planted_sample, self.members, self.image,
            self.record, self.index,
        ]  # fmt: skip

    def shard_on_disk(self, random: random.Random) -> str:
        """A file of the data set is mutated before it is opened: refused, or each sample is right or refused."""
        name = random.choice(sorted(self.files))
        self._restore({name: mutated_file(self.files[name], random)})
        try:
            dataset = open_dataset(self.work / "set")
        except UserError:
            return "refused on opening"
        return self._read_all(ShardReader(dataset))

    def window_of_a_changing_shard(self, random: random.Random) -> str:
        """A tar changes after the data set was opened: a window has the right samples, and stand-ins for the rest."""
        self._restore({})
        numbers = np.array(random.sample(range(SAMPLES), 3))
        reader = ShardReader(open_dataset(self.work / "set"))
        dataset = WindowDataset(reader, self.encoder, self.collator, SequentialNumbers(3, 0, 1))
        tar = self.work / "set" / reader.place(int(numbers[0]))[0]
        tar.write_bytes(mutated_file(tar.read_bytes(), random))
        window = dataset.window([numbers])
        bad = {sample.number for sample in window.bad}
        [micro] = window.micro_batches
        expected = {int(n): f"sample-{n}" for n in numbers if n not in bad}
        found = {int(n): name for n, name in zip(numbers, micro.ids, strict=True) if n not in bad}
        if found != expected or len(micro.segments) != len(expected):
            raise WrongError(f"{found} instead of {expected}")
        return "with stand-ins" if bad else "right"

    def planted_sample(self, random: random.Random) -> str:
        """Every sum agrees with bytes that lie: whatever is accepted is a sample that fits together."""
        self._restore({})
        number = random.randrange(SAMPLES)
        true = sample_bytes(self.work / "set", number)
        lie = HOSTILE[random.choice(sorted(HOSTILE))](members_of(true)) if random.random() < 0.5 else true
        plant(self.work / "set", number, mutated_tar(lie, random) or bytes(512))
        reader = ShardReader(open_dataset(self.work / "set"))
        try:
            sample = reader.read(number)
        except UserError:
            return "refused"
        return self._use(sample)

    def members(self, random: random.Random) -> str:
        """Members are dropped, doubled, moved, renamed or mutated under sound headers."""
        number = random.randrange(SAMPLES)
        members = {f"{key_of(number)}.{name}": data for name, data in encode_members(self.samples[number]).items()}
        try:
            sample = decode_members(mutated_members(members, random), key_of(number))
        except MemberError:
            return "refused"
        return "right" if sample == self.samples[number] else self._use(sample)

    def image(self, random: random.Random) -> str:
        """An image is mutated, or a bomb: decoded within the limit of pixels, or refused."""
        data = (
            png_bomb(random.randrange(8_500, 60_000))
            if random.random() < 0.05
            else mutated(random.choice(self.images), random)
        )
        try:
            [(patches, (height, width))] = self.encoder.images([data])
        except SampleError:
            return "refused"
        if patches.shape != (height * width, 588) or patches.dtype != np.uint8:
            raise WrongError(f"patches {patches.shape} {patches.dtype} for a grid of {height} x {width}")
        return "decoded"

    def record(self, random: random.Random) -> str:
        """A line of JSON Lines is mutated: packed as a sample that fits together, or rejected with a reason."""
        source = self.work / "records.jsonl"
        lines = list(self.records)
        at = random.randrange(len(lines))
        lines[at] = mutated_json(lines[at], random)
        source.write_bytes(b"\n".join(lines))
        try:
            found = list(read_records(source, self.image_root))
        except UserError:
            return "refused"
        for record in found:
            if isinstance(record, Sample):
                check_sample(record)
            elif not record.reason or "\n" in record.reason:
                raise WrongError(f"a reason in one line: {record.reason!r}")
        return "rejected" if any(isinstance(record, Rejected) for record in found) else "accepted"

    def index(self, random: random.Random) -> str:
        """A mutated tar is indexed: refused, or the index is that of a whole tar with these samples."""
        tar = self.work / "shard-000000.tar"
        tar.write_bytes(mutated_tar(self.files["shard-000000.tar"], random))
        try:
            index = build_index(tar, 0, [1] * PER_SHARD)
        except MemberError:
            return "refused"
        data = tar.read_bytes()
        for number, entry in enumerate(index):
            try:
                decode_members(data[int(entry["offset"]) : int(entry["offset"]) + int(entry["length"])], key_of(number))
            except MemberError:
                return "indexed, a sample refused"
        return "indexed"

    def _restore(self, changes: dict[str, bytes]) -> None:
        shutil.rmtree(self.work / "set", ignore_errors=True)
        (self.work / "set").mkdir()
        for name, data in {**self.files, **changes}.items():
            (self.work / "set" / name).write_bytes(data)

    def _read_all(self, reader: ShardReader) -> str:
        refused = 0
        for number, sample in enumerate(self.samples):
            try:
                if reader.read(number) != sample:
                    raise WrongError(f"sample {number} is another than the one that was packed")
            except UserError:
                refused += 1
        return "samples refused" if refused else "right"

    def _use(self, sample: Sample) -> str:
        check_sample(sample)
        try:
            encoded = self.encoder(sample)
        except SampleError:
            return "refused when encoding"
        if len(encoded.segments) != len(sample.helper_images):
            raise WrongError("segments without helper images")
        return "another sample, whole"


def pictures(kind: str, size: tuple[int, int]) -> bytes:
    """An image with content, so that its compressed data are not trivial."""
    ramp = np.add.outer(np.arange(size[1]), np.arange(size[0]))[..., None] * np.array([3, 5, 7])
    buffer = io.BytesIO()
    Image.fromarray((ramp % 256).astype(np.uint8)).save(buffer, kind)
    return buffer.getvalue()


def mutated(data: bytes, random: random.Random) -> bytes:
    """One to four flips, cuts, insertions, swaps or runs of zeros."""
    changed = bytearray(data)
    for _ in range(random.randint(1, 4)):
        if not changed:
            break
        at, length = random.randrange(len(changed)), random.choice((1, 2, 4, 16, 512))
        kind = random.choice(("bit", "byte", "cut", "drop", "insert", "zero", "repeat"))
        if kind == "bit":
            changed[at] ^= 1 << random.randrange(8)
        elif kind == "byte":
            changed[at] = random.choice((0, 0x20, 0x2F, 0x7F, 0xFF, random.randrange(256)))
        elif kind == "cut":
            del changed[at:]
        elif kind == "drop":
            del changed[at : at + length]
        elif kind == "insert":
            changed[at:at] = random.randbytes(length)
        elif kind == "zero":
            changed[at : at + length] = bytes(length)
        else:
            changed[at:at] = changed[at : at + length]
    return bytes(changed)


def mutated_tar(data: bytes, random: random.Random) -> bytes:
    """Blocks of a tar cut, dropped, doubled or swapped, a header edited with a right checksum, or any bytes."""
    kind = random.choice(("cut", "drop", "double", "swap", "header", "bytes", "bytes"))
    blocks = [data[start : start + 512] for start in range(0, len(data), 512)]
    if kind == "bytes" or len(blocks) < 2:
        return mutated(data, random)
    a, b = sorted(random.sample(range(len(blocks)), 2))
    if kind == "cut":
        blocks = blocks[:b]
    elif kind == "drop":
        del blocks[a:b]
    elif kind == "double":
        blocks[b:b] = blocks[a:b]
    elif kind == "swap":
        blocks[a], blocks[b] = blocks[b], blocks[a]
    else:
        headers = [i for i, block in enumerate(blocks) if block[257:262] == b"ustar"]
        if headers:
            at = random.choice(headers)
            blocks[at] = edited_header(blocks[at], random)
    return b"".join(blocks)


def edited_header(block: bytes, random: random.Random) -> bytes:
    """A header with another name, size, type or link, and the checksum that fits."""
    try:
        info = tarfile.TarInfo.frombuf(block, "ascii", "surrogateescape")
    except tarfile.HeaderError:
        return block
    kind = random.choice(("name", "size", "type", "link"))
    if kind == "name":
        info.name = random.choice(("../x.json", "/etc/passwd", "", "0000000000.json", info.name + ".pkl", "a" * 90))
    elif kind == "size":
        info.size = random.choice((0, 1, info.size + 1, info.size + 512, 2**33 - 1, 1_400_000_000))
    elif kind == "type":
        info.type = bytes([random.choice(b"0123456789SLKxgDV\0")])
    else:
        info.type, info.linkname = tarfile.SYMTYPE, "/etc/passwd"
    return info.tobuf(tarfile.USTAR_FORMAT)[:512]


def mutated_file(data: bytes, random: random.Random) -> bytes:
    """A file of a data set: as a tar, as bytes, or another of the same length."""
    changed = mutated_tar(data, random)
    keep_length = random.random() < 0.5  # the size alone is not to give it away
    return changed[: len(data)].ljust(len(data), b"\0") if keep_length else changed


def mutated_members(members: Members, random: random.Random) -> bytes:
    """The members with one of them changed; the headers are those of the changed member."""
    items = list(members.items())
    at = random.randrange(len(items))
    name, data = items[at]
    kind = random.choice(("order", "drop", "double", "rename", "content", "text", "foreign"))
    if kind == "order":
        random.shuffle(items)
    elif kind == "drop":
        del items[at]
    elif kind == "double":
        items.insert(random.randrange(len(items) + 1), (name, data))
    elif kind == "rename":
        items[at] = (random.choice(items)[0][: random.randint(1, 16)] + random.choice((".in0.png", ".json", "")), data)
    elif kind == "content":
        items[at] = (name, mutated(data, random))
    elif kind == "text":
        text = next(i for i, (key, _) in enumerate(items) if key.endswith("json"))
        items[text] = (items[text][0], mutated_json(items[text][1], random))
    else:
        return HOSTILE[random.choice(sorted(HOSTILE))](members)
    return b"".join(member_blocks(name, data) for name, data in items)


def mutated_json(text: bytes, random: random.Random) -> bytes:
    """A JSON object with a value, a key or its text changed."""
    if random.random() < 0.3:
        return mutated(text, random).replace(b"\n", b" ")
    content = json.loads(text)
    odd = [
        None,
        True,
        0,
        -1,
        1e308,
        "",
        "\ud800",
        "../../etc/passwd",
        "<image>",
        "<|latent_start|>",
        [],
        {},
        [[]],
        "x" * 10_000,
    ]
    key = random.choice(sorted(content))
    kind = random.choice(("value", "drop", "add", "inner"))
    if kind == "value":
        content[key] = random.choice(odd)
    elif kind == "drop":
        del content[key]
    elif kind == "add":
        content[random.choice(("meta", "group", "images", "type", "\ud800"))] = random.choice(odd)
    else:
        inner = next((v for v in content.values() if isinstance(v, list) and v), [])
        if inner:
            inner[random.randrange(len(inner))] = random.choice(odd)
    return json.dumps(content).encode()


def fuzz(seed: int, count: int, folder: Path) -> Counter[str]:
    """Try `count` mutations, the targets in turn; raises with target, seed and number of one that goes wrong."""
    fuzzer = Fuzzer(folder)
    outcomes: Counter[str] = Counter()
    for number in range(count):
        target = fuzzer.targets[number % len(fuzzer.targets)]
        try:
            outcomes[f"{target.__name__}: {target(random.Random(f'{seed}-{number}'))}"] += 1
        except Exception as error:
            raise WrongError(
                f"{target.__name__}, seed {seed}, number {number}: {type(error).__name__}: {error}"
            ) from error
    return outcomes


def main() -> None:
    """Fuzz under a limit of memory; prints what came of it."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=time.time_ns() % 10**6)
    options = parser.parse_args()
    print(f"seed {options.seed}", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        fuzz(options.seed, 14, Path(folder) / "first")  # what the first calls load is not what a bomb takes
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        limit = pages * resource.getpagesize() + MEMORY_BYTES
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        outcomes = fuzz(options.seed, options.count, Path(folder) / "all")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    print(json.dumps({"tried": options.count, "peak_mb": peak, "outcomes": dict(sorted(outcomes.items()))}, indent=1))


if __name__ == "__main__":
    main()
