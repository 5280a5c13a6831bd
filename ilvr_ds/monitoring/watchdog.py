"""Notices a rank that died or hangs, and ends the job with its name.

A rank that is killed or stopped says nothing, and the others wait for it inside a collective, for as long as the
communication library lets them. So a thread on each rank writes a heartbeat and the rank's position to a small
key-value store on the main rank; the main rank's thread reads all of them, the others read the main rank's.
"""

from __future__ import annotations

import faulthandler
import json
import logging
import os
import socket
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from torch.distributed import DistError, TCPStore  # type: ignore[attr-defined]

from ilvr_ds import dist

logger = logging.getLogger("ilvr_ds")
LONGEST_BEAT_S = 3.0
"""Longest time between two heartbeats."""
SHORTEST_PAUSE_S = 0.3
"""A rank reports its position at once, but not more often than this."""
LONGEST_END_S = 60.0
"""Time that a failing rank leaves its watch to report and end the process."""
SILENT_BEATS = 4
"""Once a rank has failed, one that misses this many heartbeats is lost."""
MAX_IDS = 8
"""Sample ids that a position names."""
VERDICT = "verdict"


@dataclass
class Position:
    """What a rank is doing."""

    step: int = 0
    phase: str = "start"
    ids: tuple[str, ...] = ()
    changes: int = 0

    def __str__(self) -> str:
        named = ", ".join(self.ids[:MAX_IDS]) + (
            f" and {len(self.ids) - MAX_IDS} more" if len(self.ids) > MAX_IDS else ""
        )
        return f"step {self.step + 1}, {self.phase}" + (f", samples {named}" if self.ids else "")


@dataclass
class _Seen:
    """What the main rank last read about a rank, and when that changed."""

    where: str
    beat: int = -1
    changes: int = -1
    failed: tuple[float, str] | None = None
    heard: float = 0.0
    moved: float = 0.0

    def update(self, told: dict[str, Any], now: float) -> None:
        """Take in what the rank said."""
        if not told:
            return
        if told["beat"] != self.beat:
            self.beat, self.heard, self.where = told["beat"], now, told["where"]
        if told["changes"] != self.changes:
            self.changes, self.moved = told["changes"], now
        if "failed" in told:
            self.failed = tuple(told["failed"])


class Watchdog:
    """One for each rank, made together (collective).

    silent_s: a rank without a heartbeat for this long is lost. stalled_s: the job hangs when no rank has changed its
    position for this long. In both cases `on_loss` is called and the process ends with exit code 1.
    """

    def __init__(self, silent_s: float, stalled_s: float, on_loss: Callable[[], object]) -> None:
        self.silent_s, self.stalled_s, self.on_loss = silent_s, stalled_s, on_loss
        self.beat_s = min(LONGEST_BEAT_S, silent_s / 6)
        self.rank, self.ranks = dist.rank(), dist.world_size()  # the watch may outlive the process group
        self.position = Position()
        self._beat = 0
        self._answered = time.monotonic()
        self._failed: tuple[float, str] | None = None
        self._ended, self._moved, self._ending = threading.Event(), threading.Event(), threading.Event()
        self._store: Any = None
        self._thread: threading.Thread | None = None
        if self.ranks > 1:
            self._store = self._connect()
            self._thread = threading.Thread(target=self._run, name="watchdog", daemon=True)
            self._thread.start()
            threading.Thread(target=self._guard, name="watchdog's clock", daemon=True).start()

    def at(self, step: int, phase: str, ids: tuple[str, ...] = ()) -> None:
        """The rank begins a phase; its thread reports it."""
        self.position = Position(step, phase, ids, self.position.changes + 1)
        self._moved.set()

    def stop(self) -> None:
        """End the watch on all ranks together (collective)."""
        if self._thread is None:
            return
        dist.barrier()
        self._ended.set()
        self._moved.set()
        self._thread.join()
        dist.barrier()  # the main rank's store outlives everybody's last read

    def leave(self) -> None:
        """End the watch of this rank alone, which has reported its error and ends."""
        self._ended.set()

    def explain(self, error: BaseException) -> str:
        """One line on an error of this rank.

        With other ranks it first waits for their watch, which finds the earliest error or the lost rank and ends the
        process; it returns only where that did not happen."""
        reason = str(error).strip().partition("\n")[0] or "no reason given"
        line = f"{self.position}: {type(error).__name__}: {reason}"
        if self._store is not None:
            self._failed = (time.time(), line)
            if self._ending.wait((SILENT_BEATS + 4) * self.beat_s):
                time.sleep(LONGEST_END_S)  # the watch ends the process
        return line

    def _connect(self) -> Any:
        """The store: served by the main rank on a free port, apart from the collectives' own."""
        timeout = timedelta(seconds=self.silent_s)
        host = os.environ["MASTER_ADDR"]
        server: list[Any] = []

        def serve() -> int:
            server.append(TCPStore(host, 0, None, True, timeout, wait_for_workers=False))
            return int(server[0].port)

        port = dist.decided_by_main(serve)
        return server[0] if server else TCPStore(host, port, None, False, timeout)

    def _run(self) -> None:
        watch = self._watch_all() if self.rank == 0 else self._watch_main()
        next_beat = time.monotonic()
        while not self._ended.is_set():
            self._moved.wait(max(0.0, next_beat - time.monotonic()))
            self._moved.clear()
            is_beat = time.monotonic() >= next_beat
            try:
                self._say(is_beat)
                verdict = watch() if is_beat else None
                self._answered = time.monotonic()
            except (RuntimeError, DistError) as error:  # the store is the main rank's
                verdict = f"rank 0 does not answer ({str(error).partition(chr(10))[0][:120]})"
            if verdict:
                self._end(verdict)
            next_beat += self.beat_s if is_beat else 0
            self._ended.wait(SHORTEST_PAUSE_S)

    def _guard(self) -> None:
        """Calls to the store hang when the main rank is stopped: a second thread watches the clock."""
        while not self._ended.wait(self.beat_s):
            if time.monotonic() - self._answered > self.silent_s:
                self._end(f"rank 0 does not answer for {self.silent_s:.0f} s")

    def _say(self, is_beat: bool) -> None:
        self._beat += is_beat
        who = f"rank {self.rank} on {socket.gethostname()}, process {os.getpid()}"
        told = {"beat": self._beat, "changes": self.position.changes, "where": f"{who}: {self.position}"}
        if self._failed:
            told["failed"] = (self._failed[0], f"{who}: {self._failed[1]}")
        self._store.set(f"rank/{self.rank}", json.dumps(told))

    def _watch_all(self) -> Callable[[], str | None]:
        start = time.monotonic()
        seen = [_Seen(f"rank {rank}", heard=start, moved=start) for rank in range(self.ranks)]
        failed_since = float("inf")

        def watch() -> str | None:
            nonlocal failed_since
            now = time.monotonic()
            for last, told in zip(seen, self._told(), strict=True):
                last.update(told, now)
            failures = sorted(last.failed for last in seen if last.failed)
            failed_since = min(failed_since, now) if failures else failed_since
            patience = SILENT_BEATS * self.beat_s if failures else self.silent_s
            lost = [last.where for last in seen if not last.failed and now - last.heard > patience]
            if lost:
                return "no sign of life from " + "; ".join(lost)
            if failures and now - failed_since > patience:
                return failures[0][1]
            if not failures and all(now - last.moved > self.stalled_s for last in seen):
                least = min(last.changes for last in seen)
                behind = "; ".join(last.where for last in seen if last.changes == least)
                return f"nothing moved for {self.stalled_s:.0f} s; furthest behind: {behind}"
            return None

        return watch

    def _told(self) -> list[dict[str, Any]]:
        """What each rank last wrote; empty before its first heartbeat."""
        keys = [f"rank/{rank}" for rank in range(self.ranks)]
        present = [key for key in keys if self._store.check([key])]
        said = dict(zip(present, self._store.multi_get(present), strict=True))
        return [json.loads(said[key]) if key in said else {} for key in keys]

    def _watch_main(self) -> Callable[[], str | None]:
        last, heard = -1, time.monotonic()

        def watch() -> str | None:
            nonlocal last, heard
            if self._store.check([VERDICT]):
                return str(self._store.get(VERDICT).decode())
            beat = json.loads(self._store.get("rank/0"))["beat"]
            if beat != last:
                last, heard = beat, time.monotonic()
            silent = time.monotonic() - heard > self.silent_s
            return f"no sign of life from rank 0 for {self.silent_s:.0f} s" if silent else None

        return watch

    def _end(self, verdict: str) -> None:
        """Tell the others, then end this process, whose main thread may be stuck for ever."""
        if self._ending.is_set():
            return
        self._ending.set()
        last = threading.Timer(LONGEST_END_S, self._leave, (verdict,))  # whatever hangs meanwhile
        last.daemon = True
        last.start()
        try:
            self._last_words(verdict)
        finally:
            self._leave(verdict)

    def _last_words(self, verdict: str) -> None:
        """Report what helps. Each step may fail: the disk may be full, the store gone."""
        for word in (lambda: self._tell(verdict), _show_stacks, self.on_loss):
            try:
                word()
            except Exception:  # the verdict, and the end, matter more
                logger.exception("while this rank ends")

    def _tell(self, verdict: str) -> None:
        if self.rank == 0:
            self._store.set(VERDICT, verdict)
            time.sleep(2 * self.beat_s)

    def _leave(self, verdict: str) -> None:
        """Say why, and end the process."""
        try:
            here = f"[rank {self.rank}] {self.position}"
            sys.stderr.write(f"{here}\n[rank {self.rank}] ilvr-ds: error: {verdict}\n")
            sys.stderr.flush()
        finally:
            os._exit(1)


def _show_stacks() -> None:
    logger.error("this rank stands here:")
    faulthandler.dump_traceback(all_threads=True)
