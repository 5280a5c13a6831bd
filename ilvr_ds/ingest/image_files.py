"""Images that records name: paths that stay below the image root, files that decode."""

from __future__ import annotations

import stat
from pathlib import Path, PurePosixPath

from ilvr_ds.data.decode import decode_image
from ilvr_ds.data.sample import SampleError

IMAGE_BYTES_LIMIT = 64 * 1024 * 1024


def path_below(root: Path, name: str, what: str) -> PurePosixPath:
    """A record's path relative to `root`, also where it is absolute.

    Raises SampleError where it leaves the root by itself; links that the user put there are followed.
    """
    path = PurePosixPath(name)
    if path.is_absolute():
        places = (place for place in (root.absolute(), root.resolve()) if path.is_relative_to(place))
        path = next((path.relative_to(place) for place in places), path)
    if path.is_absolute() or ".." in path.parts:
        raise SampleError(f"{what} '{name}': the path leaves the image root {root}")
    return path


def read_image(root: Path, name: PurePosixPath, what: str) -> bytes:
    """The bytes of an image below `root`; raises SampleError unless it decodes and is within the limits."""
    try:
        data = _read_limited(root / name)
        decode_image(data)
    except FileNotFoundError as error:
        raise SampleError(f"{what} '{name}' is missing below {root}") from error
    except OSError as error:
        raise SampleError(f"{what} '{name}' cannot be read ({error.strerror})") from error
    except SampleError as error:
        raise SampleError(f"{what} '{name}': {error}") from error
    except ValueError as error:
        raise SampleError(f"{what} {str(name)!r}: no file can have this name") from error
    return data


def _read_limited(path: Path) -> bytes:
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        raise SampleError("not a file")
    if status.st_size > IMAGE_BYTES_LIMIT:
        raise SampleError(f"{status.st_size} bytes, the limit is {IMAGE_BYTES_LIMIT}")
    return path.read_bytes()
