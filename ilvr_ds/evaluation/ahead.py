"""Work of the CPU that is done while the device does its own."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")
S = TypeVar("S")


def ahead(function: Callable[[T], S], items: Iterable[T], count: int) -> Generator[S]:
    """`function` of each item, in order, by one other thread, up to `count` items before they are asked for.

    What it raises is raised where the item is asked for.
    """
    waiting: deque[Future[S]] = deque()
    with ThreadPoolExecutor(1, "ahead") as pool:
        try:
            for item in items:
                waiting.append(pool.submit(function, item))
                if len(waiting) > count:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()
