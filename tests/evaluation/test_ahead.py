from __future__ import annotations

import threading

import pytest

from ilvr_ds.evaluation.ahead import ahead


def test_work_is_done_in_order_by_another_thread_and_only_so_far_ahead() -> None:
    done: list[int] = []
    threads = set()

    def work(item: int) -> int:
        threads.add(threading.current_thread())
        done.append(item)
        return 10 * item

    results = ahead(work, range(100), 3)
    assert next(results) == 0 and len(done) <= 4
    results.close()
    assert len(done) <= 5 and threads == threads - {threading.main_thread()}
    assert list(ahead(work, range(7), 3)) == [0, 10, 20, 30, 40, 50, 60]


def test_what_it_raises_comes_with_its_item() -> None:
    def work(item: int) -> int:
        if item == 2:
            raise ValueError("the third")
        return item

    results = ahead(work, range(5), 2)
    assert [next(results), next(results)] == [0, 1]
    with pytest.raises(ValueError, match="the third"):
        next(results)
