"""The end of a rank whose main thread may be stuck; what the watch sees is tested on ranks (distributed/)."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from ilvr_ds import dist
from ilvr_ds.monitoring.watchdog import Watchdog

SCRIPT = """
import sys, threading, time
from types import SimpleNamespace
from ilvr_ds.monitoring import watchdog

def fail(*_):
    raise OSError(28, "No space left on device")

def hang(*_):
    time.sleep(600)

def work(*_):
    pass

watchdog.LONGEST_END_S = 2.0
dog = watchdog.Watchdog(0.6, 60.0, {on_loss})
dog._store = SimpleNamespace(set={tell})
threading.Thread(target=dog._end, args=("rank 1 is lost",)).start()
time.sleep(600)  # in a collective
"""


@pytest.mark.parametrize(
    ("on_loss", "tell", "stderr"),
    [("fail", "work", ""), ("hang", "work", ""), ("work", "fail", ""), ("work", "hang", ""), ("work", "work", "full")],
)
def test_a_lost_job_ends_whatever_fails_on_the_way(on_loss: str, tell: str, stderr: str, tmp_path: Path) -> None:
    """Catches a rank that stays in its collective because its last words failed, or never came to an end."""
    log = tmp_path / "log"
    command = [sys.executable, "-c", SCRIPT.format(on_loss=on_loss, tell=tell)]
    with Path("/dev/full" if stderr else log).open("w") as file:
        ended = subprocess.run(command, stderr=file, timeout=40, check=False)
    assert ended.returncode == 1
    if not stderr:
        assert log.read_text().strip().endswith("[rank 0] ilvr-ds: error: rank 1 is lost")


class Store(dict[str, str]):
    """A store in this process."""

    def set(self, key: str, value: str) -> None:
        self[key] = value

    def check(self, keys: list[str]) -> bool:
        return all(key in self for key in keys)

    def multi_get(self, keys: list[str]) -> list[str]:
        return [self[key] for key in keys]


@pytest.mark.parametrize("rank", [0, 1])
def test_a_watch_that_outlives_the_process_group_speaks_for_its_own_rank(
    rank: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A trainer that is left open is watched until the process ends. Without a group every process is rank 0 of 1: one
    would report in the main rank's name, and the main rank's thread would count too few."""
    store: Any = Store()
    monkeypatch.setattr(Watchdog, "_connect", lambda _: store)
    monkeypatch.setattr("threading.Thread.start", lambda _: None)
    monkeypatch.setattr(dist, "rank", lambda: rank)
    monkeypatch.setattr(dist, "world_size", lambda: 2)
    dog = Watchdog(60.0, 60.0, lambda: None)
    watch = dog._watch_all()
    monkeypatch.setattr(dist, "rank", lambda: 0)
    monkeypatch.setattr(dist, "world_size", lambda: 1)
    dog._say(is_beat=True)
    assert list(store) == [f"rank/{rank}"]
    assert watch() is None
