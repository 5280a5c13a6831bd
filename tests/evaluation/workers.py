"""Work on the test's ranks that signals stop."""

from __future__ import annotations

import os
import signal
import threading
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

from ilvr_ds import dist
from ilvr_ds.evaluation.batches import Stopped, answer_batches
from ilvr_ds.evaluation.results import Line, Results, append
from ilvr_ds.monitoring.stop_signal import StopSignal

BATCHES = 100


def stopped_work(output: Path, asked: str) -> dict[str, Any]:
    """Batches of one sample; rank 1 alone is asked to stop, in its second one or when it has none left."""
    dist.join_on_host(timedelta(minutes=2))
    results, answered, said = Results(output), list[int](), ""

    def answer(batch: range) -> list[Line]:
        [number] = batch
        if dist.rank() == 1 and number > 2:
            signal.raise_signal(signal.SIGUSR1)
            time.sleep(60)
        time.sleep(0.1)
        answered.append(number)
        return [{"number": number}]

    dist.decided_by_main(lambda: results.open({}))
    waits = dist.rank() == 1 and asked == "while it waits for the other"
    if waits:
        with results.part(1) as file:
            append(file, [{"number": number} for number in range(1, BATCHES, 2)])
    dist.barrier()
    with StopSignal() as stop:
        if waits:
            threading.Timer(0.5, lambda: os.kill(os.getpid(), signal.SIGTERM)).start()
        try:
            answer_batches(results, list(range(BATCHES)), 1, answer, "work", stop)
        except Stopped as stopped:
            said = str(stopped)
    dist.close()
    return {"answered": answered, "said": said}
