"""Small images, samples and data sets for the tests of the data files, and a web server that serves them."""

import functools
import http.server
import io
import json
import re
import struct
import threading
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from PIL import Image

from ilvr_ds.data.sample import LatentStep, Sample, TextStep
from ilvr_ds.data.shards import Manifest
from ilvr_ds.data.writer import DatasetWriter, Provenance


def image_bytes(shade: int = 0, kind: str = "PNG", size: tuple[int, int] = (8, 6)) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, (shade % 256, shade // 256 % 256, 7)).save(buffer, kind)
    return buffer.getvalue()


def noise_png(size: tuple[int, int], mode: str = "RGB") -> bytes:
    """A PNG of random pixels, of width and height `size`."""
    width, height = size
    channels = {"RGB": 3, "RGBA": 4}.get(mode)
    shape = (height, width, channels) if channels else (height, width)
    pixels = np.random.default_rng(width).integers(0, 256, shape, dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels, mode).save(buffer, "PNG")
    return buffer.getvalue()


def png_chunk(name: bytes, body: bytes) -> bytes:
    """Of a PNG."""
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))


def png_bomb(side: int = 50_000) -> bytes:
    """A PNG of 80 bytes that claims to be side x side pixels."""
    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + png_chunk(b"IHDR", header)
        + png_chunk(b"IDAT", zlib.compress(b""))
        + png_chunk(b"IEND", b"")
    )


def make_sample(number: int, *, plan: bool = True, kind: str = "PNG") -> Sample:
    return Sample(
        id=f"sample-{number}",
        question=f"What is {number}?\nGrün oder 蓝?",
        steps=(TextStep("Look: "), LatentStep(0), TextStep(f"It is {number}.")) if plan else (),
        input_images=(image_bytes(number, kind), image_bytes(number + 1)),
        helper_images=(image_bytes(number + 2),) if plan else (),
        answer=str(number),
        group=("creation", "deletion")[number % 2],
        meta={"map_desc": "[[1, 2]]"},
    )


def write_shards(samples: Iterable[tuple[Sample, int]], output: Path, **options: Any) -> Manifest:
    """Write samples with their lengths in tokens; `options` are DatasetWriter's."""
    with DatasetWriter(output, **options) as writer:
        for sample, tokens in samples:
            writer.write(sample, tokens)
        return writer.finish(Provenance())


def make_dataset(folder: Path, samples: int = 10, per_shard: int = 4) -> list[Sample]:
    made = [make_sample(n) for n in range(samples)]
    write_shards(((sample, 100 + n) for n, sample in enumerate(made)), folder, max_samples_per_shard=per_shard)
    return made


def contents(folder: Path) -> dict[str, bytes]:
    """Of its files, by name."""
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def write_jsonl(path: Path, records: list[dict | bytes]) -> Path:
    path.write_bytes(b"\n".join(r if isinstance(r, bytes) else json.dumps(r).encode() for r in records) + b"\n")
    return path


class RangeHandler(http.server.SimpleHTTPRequestHandler):
    """Serves files, with byte ranges; `faults` are taken from the front, one for each request."""

    protocol_version = "HTTP/1.1"
    faults: ClassVar[list[str]] = []
    requests: ClassVar[list[tuple[str, str | None]]] = []

    def do_GET(self) -> None:
        wanted = self.headers.get("Range")
        self.requests.append((self.path, wanted))
        fault = self.faults.pop(0) if self.faults else ""
        path = Path(self.translate_path(self.path))
        if fault.isdigit():
            return self.send_error(int(fault))
        if not path.is_file():
            return self.send_error(404)
        data = path.read_bytes()
        partial = wanted and fault not in ("whole", "endless")
        self.send_response(206 if partial else 200)
        body = data
        if partial:
            first, last = (int(n) for n in re.fullmatch(r"bytes=(\d+)-(\d+)", wanted).groups())
            body = data[first : last + 1]
            shift = fault == "shifted"
            self.send_header("Content-Range", f"bytes {first + shift}-{last + shift}/{len(data)}")
        body = body[:-1] if fault == "short" else body
        self.send_header("Content-Length", str(10**12 if fault == "endless" else len(body)))
        self.end_headers()
        self.wfile.write(body[: len(body) // 2] if fault == "cut" else body)
        self.close_connection = fault in ("cut", "endless")

    def log_message(self, *args: object) -> None:
        pass


@contextmanager
def serve(folder: Path, *faults: str) -> Iterator[tuple[str, type[RangeHandler]]]:
    """Address of a server for `folder`, and its handler, whose `requests` and `faults` can be looked at and set."""
    handler = type("Handler", (RangeHandler,), {"faults": list(faults), "requests": []})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(handler, directory=str(folder)))
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}", handler
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
