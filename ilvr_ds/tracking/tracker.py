"""Experiment tracking: the record of a run, and the thread that copies it to MLflow without holding up training.

A slow or absent server costs nothing but delay: the rest is sent when the run goes on, or by `ilvr-ds mlflow-sync`, and
nothing is sent twice (mlflow_copy.py).
"""

from __future__ import annotations

import logging
import shlex
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ilvr_ds.errors import first_line
from ilvr_ds.tracking.earlier import go_back, set_aside
from ilvr_ds.tracking.mlflow_copy import MlflowCopy
from ilvr_ds.tracking.mlflow_state import (
    PARENT_TAG,
    WENT_BACK_TAG,
    CopyState,
    Status,
    TrackingTarget,
    read_state,
    write_state,
)
from ilvr_ds.tracking.names import without_password
from ilvr_ds.tracking.record import Record, read_record

logger = logging.getLogger("ilvr_ds")

FIRST_RETRY_S, LAST_RETRY_S = 1.0, 60.0

__all__ = ["Status", "Tracker", "TrackingTarget", "charts_page"]


def charts_page(server: str, experiment_id: str | None) -> str:
    """Address of an experiment's charts; MLflow's start page shows something else."""
    charts = f"experiments/{experiment_id}/runs?compareRunsMode=CHART&workflowType=machine_learning"
    return f"{server}/#/{charts}" if experiment_id else f"{server}/"


class Tracker:
    """Records a run's metrics and events on the main rank; does nothing on other ranks."""

    def __init__(
        self,
        directory: Path,
        target: TrackingTarget,
        *,
        params: Mapping[str, object],
        tags: Mapping[str, str],
        artifacts: Sequence[Path] = (),
        datasets: Sequence[dict[str, Any]] = (),
        is_writer: bool = True,
        goes_on: bool = True,
        back_to: int | None = None,
        run_id: str | None = None,
    ) -> None:
        """`goes_on` False: the run starts over, and the record of an earlier attempt in `directory` is set aside.
        `back_to`: the run continues from this step; what it recorded after it is set aside.

        `datasets`: as in CopyState. `run_id`: MLflow's id of the run that goes on, in case `directory` has lost it.
        """
        self.target = target
        self._directory = directory
        self._record: Record | None = None
        self._shipper: _Shipper | None = None
        if is_writer:
            directory.mkdir(parents=True, exist_ok=True)
            if not goes_on:
                set_aside(directory)
            elif back_to is not None:
                go_back(directory, back_to)
            self._record = Record(directory / "metrics.jsonl")
            _describe(directory, target, params, tags, artifacts, datasets, run_id)
            self._shipper = _Shipper(MlflowCopy(directory / "metrics.jsonl", directory / "mlflow.json", target))
            self._shipper.start()

    @property
    def run_id(self) -> str | None:
        """MLflow's id of this run; None until the server has assigned one, and on other ranks."""
        return self._shipper.copy.state.run_id if self._shipper else None

    def how_to_look(self) -> str:
        """How to see this run's charts: a page of its server, or a command."""
        experiment = self._shipper.copy.state.experiment_id if self._shipper else None
        uri = without_password(self.target.resolved_uri())
        folder = shlex.quote(str(self._directory))
        return charts_page(uri, experiment) if uri.startswith("http") else f"ilvr-ds ui {folder}"

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Record the metrics of a step; returns at once."""
        if self._record and self._shipper:
            self._record.metrics(step, metrics)
            self._shipper.wake()

    def event(self, name: str, **details: Any) -> None:
        """Record an event; MLflow only gets pictures and the folder of the newest checkpoint."""
        if self._record:
            self._record.event(name, **details)

    def picture(self, step: int, key: str, file: str, seconds: float) -> None:
        """Record a PNG file of the folder `pictures`, drawn in `seconds`; `key` is its name in MLflow.

        Any thread may call.
        """
        if self._record and self._shipper:
            self._record.event("picture", step=step, key=key, file=file, seconds=seconds)
            self._shipper.wake()

    def looks(self, step: int) -> set[str]:
        """Which of "evaluation" and "pictures" the record holds after `step` optimizer steps (main rank)."""
        found = set()
        for line, _ in read_record(self._directory / "metrics.jsonl"):
            if line.get("step") == step:
                if any(name.startswith("eval/") for name in line.get("metrics", {})):
                    found.add("evaluation")
                if line.get("event") == "picture":
                    found.add("pictures")
        return found

    def evaluations(self) -> list[tuple[int, dict[str, float]]]:
        """Steps and `eval/...` metrics of all that the record holds, the last of each step, in order (main rank)."""
        found: dict[int, dict[str, float]] = {}
        for line, _ in read_record(self._directory / "metrics.jsonl"):
            metrics = {name: float(value) for name, value in line.get("metrics", {}).items() if name[:5] == "eval/"}
            if metrics:
                found[line["step"]] = metrics
        return sorted(found.items(), key=lambda item: item[0])

    def close(self, status: Status, timeout_s: float = 30.0) -> int:
        """Send the rest for at most `timeout_s`; returns the number of lines not sent."""
        if not self._record or not self._shipper:
            return 0
        self._record.event("end", status=status)
        self._record.close()
        unsent = self._shipper.finish(status, timeout_s)
        if unsent:
            logger.warning(
                "%d lines of %s did not reach MLflow at %s; send them with: ilvr-ds mlflow-sync %s",
                unsent, self._record.path, without_password(self.target.resolved_uri()), self._directory,
            )  # fmt: skip
        return unsent


class _Shipper(threading.Thread):
    """Copies the record in the background. A daemon thread: a server that hangs cannot keep the process alive."""

    def __init__(self, copy: MlflowCopy) -> None:
        super().__init__(name="mlflow", daemon=True)
        self.copy = copy
        self._wake, self._ending, self._given_up = threading.Event(), threading.Event(), threading.Event()
        self._status: Status | None = None
        self._warned = False

    def wake(self) -> None:
        """Something new is there to send."""
        self._wake.set()

    def finish(self, status: Status, timeout_s: float) -> int:
        """Send the rest and close the MLflow run; gives up after `timeout_s`. Returns the number of lines not sent.

        After that the thread ends with its current attempt: it does not retry for as long as the process lives.
        """
        self._status = status
        self._ending.set()
        self.wake()
        self.join(timeout_s)
        self._given_up.set()
        return self.copy.unsent()

    def run(self) -> None:
        """Send whenever woken; after a failure back off, whatever is logged meanwhile."""
        pause, marked = FIRST_RETRY_S, False
        while True:
            ending = self._status
            try:
                self.copy.send()
                if ending:
                    self.copy.end(ending)
                    return
                if not marked:
                    self.copy.mark_running()
                    marked = True
                pause = FIRST_RETRY_S
                self._wake.wait()
                self._wake.clear()
            except Exception as error:  # noqa: BLE001 - whatever a server or a network does must not end the thread
                self._report(error)
                # waking at each new line would retry a dead server once a step
                if ending:
                    self._given_up.wait(FIRST_RETRY_S)
                else:
                    self._ending.wait(pause)
                if self._given_up.is_set():
                    return
                pause = min(2 * pause, LAST_RETRY_S)

    def _report(self, error: Exception) -> None:
        if not self._warned:
            uri = without_password(self.copy.target.resolved_uri())
            logger.warning("MLflow at %s: %s; training goes on, sending is retried", uri, first_line(error))
        self._warned = True


def _describe(
    directory: Path,
    target: TrackingTarget,
    params: Mapping[str, object],
    tags: Mapping[str, str],
    artifacts: Sequence[Path],
    datasets: Sequence[dict[str, Any]],
    run_id: str | None,
) -> None:
    """Write the run's description, so that it can be sent later without the recipe."""
    is_known = (directory / "mlflow.json").exists()
    state = read_state(directory / "mlflow.json")
    if state.run_name and (state.run_name, state.experiment) != (target.run_name, target.experiment):
        logger.warning(
            "%s: the record of run '%s' in experiment '%s' goes on as '%s' in '%s': it is sent to MLflow as a new run",
            directory, state.run_name, state.experiment, target.run_name, target.experiment,
        )  # fmt: skip
        state = CopyState(tags=state.tags, attempt=state.attempt)
    state.uri = without_password(target.resolved_uri())
    state.experiment, state.run_name, state.parent = target.experiment, target.run_name, target.parent
    now = {name: without_password(str(value)) for name, value in params.items()}
    state.described = state.described and state.params == now
    state.params = now
    known = (PARENT_TAG, WENT_BACK_TAG)  # set at the first start only
    state.tags = {name: value for name, value in state.tags.items() if name in known} | {
        name: without_password(value) for name, value in tags.items()
    }
    state.artifacts = [path.name if path.parent == directory else str(path.absolute()) for path in artifacts]
    state.datasets = list(datasets)
    state.attempt, state.tagged, state.filed = state.attempt + 1, False, False
    if not is_known:
        state.run_id = run_id
    write_state(directory / "mlflow.json", state)
