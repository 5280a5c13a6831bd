"""MLflow's door: a thread copies the run's record to the tracking server and never holds up training.

`metrics.jsonl` in the run's folder is the record; `mlflow.json` beside it remembers the MLflow run and how far the
copy is. A server that is slow, refuses or comes back later costs nothing but delay: what was not sent is sent when
the run goes on, and nothing is sent twice.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from ilvr_ds.training.record import Record, read_record

logger = logging.getLogger("ilvr_ds")

BATCH = 500
"""Metrics of one request: MLflow takes up to 1,000; a request of this size takes under 0.1 s."""
FIRST_RETRY_S, LAST_RETRY_S = 1.0, 60.0
Status = Literal["FINISHED", "FAILED", "KILLED"]


@dataclass(frozen=True)
class TrackingTarget:
    """Where the copy goes. `uri` None: MLFLOW_TRACKING_URI, else a SQLite file in `root`."""

    uri: str | None
    experiment: str
    run_name: str
    root: Path

    def resolved_uri(self) -> str:
        """The tracking address, absolute."""
        return self.uri or os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{self.root.absolute() / 'mlflow.db'}"


def how_to_look(uri: str, experiment_id: str | None) -> list[str]:
    """Lines that say how to see the charts: a command for a local store, and the page."""
    charts = f"experiments/{experiment_id}/runs?compareRunsMode=CHART&workflowType=machine_learning"
    page = f"#/{charts}" if experiment_id else ""
    if uri.startswith(("http://", "https://")):
        return [f"{uri}/{page}"]
    return [f"mlflow ui --backend-store-uri {uri} --workers 1", f"http://127.0.0.1:5000/{page}"]


@dataclass
class _State:
    """How far the copy is; kept in mlflow.json."""

    run_id: str | None = None
    experiment_id: str | None = None
    described: bool = False
    """Parameters and artifacts are there."""
    offset: int = 0
    last_steps: dict[str, int] = field(default_factory=dict)
    """The last step sent of each metric: steps that are trained again after a crash are not sent again."""


class Tracker:
    """Records metrics and events of a run on the main rank; on other ranks every call does nothing."""

    def __init__(
        self,
        directory: Path,
        target: TrackingTarget,
        *,
        params: Mapping[str, object],
        tags: Mapping[str, str],
        artifacts: Sequence[Path] = (),
        is_writer: bool = True,
        goes_on: bool = True,
        run_id: str | None = None,
    ) -> None:
        """`goes_on` False: a run from step 0; the record of an earlier try in `directory` is set aside.

        `run_id`: MLflow's id of the run that goes on, for when `directory` does not know it any more.
        """
        self.target = target
        self._record: Record | None = None
        self._shipper: _Shipper | None = None
        if is_writer:
            directory.mkdir(parents=True, exist_ok=True)
            if not goes_on:
                _set_aside(directory)
            self._record = Record(directory / "metrics.jsonl")
            self._shipper = _Shipper(directory, target, params, tags, artifacts)
            if self._shipper.state.run_id is None:
                self._shipper.state.run_id = run_id
            self._shipper.start()

    @property
    def run_id(self) -> str | None:
        """MLflow's id of this run; None until the server has given one, and on other ranks."""
        return self._shipper.state.run_id if self._shipper else None

    def how_to_look(self) -> list[str]:
        """Lines that say how to see the charts of this run."""
        return how_to_look(self.target.resolved_uri(), self._shipper.state.experiment_id if self._shipper else None)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Record the metrics of a step; returns at once."""
        if self._record and self._shipper:
            self._record.metrics(step, metrics)
            self._shipper.wake()

    def event(self, name: str, **details: Any) -> None:
        """Record an event; events stay in the record and are not sent."""
        if self._record:
            self._record.event(name, **details)

    def close(self, status: Status, timeout_s: float = 30.0) -> int:
        """Send what is left for at most `timeout_s`; returns the number of lines that stay unsent."""
        if not self._record or not self._shipper:
            return 0
        self._record.event("end", status=status)
        self._record.close()
        unsent = self._shipper.finish(status, timeout_s)
        if unsent:
            logger.warning(
                "%d lines of %s did not reach MLflow at %s; they are sent when a run with this name goes on",
                unsent, self._record.path, self.target.resolved_uri(),
            )  # fmt: skip
        return unsent


class _Shipper(threading.Thread):
    """Copies the record in the background. A daemon: a server that hangs cannot keep the process alive."""

    def __init__(
        self,
        directory: Path,
        target: TrackingTarget,
        params: Mapping[str, object],
        tags: Mapping[str, str],
        artifacts: Sequence[Path],
    ) -> None:
        super().__init__(name="mlflow", daemon=True)
        self.record = directory / "metrics.jsonl"
        self.state_file = directory / "mlflow.json"
        self.target, self.params, self.tags, self.artifacts = target, params, tags, artifacts
        self.state = _read_state(self.state_file)
        self._client: Any = None
        self._wake = threading.Event()
        self._status: Status | None = None
        self._warned = False

    def wake(self) -> None:
        """There is something new to send."""
        self._wake.set()

    def finish(self, status: Status, timeout_s: float) -> int:
        """Send the rest, close the MLflow run; gives up after `timeout_s`. Returns the number of unsent lines."""
        self._status = status
        self.wake()
        self.join(timeout_s)
        return sum(1 for line, _ in read_record(self.record, self.state.offset) if "metrics" in line)

    def run(self) -> None:
        """The thread: send whenever there is something, wait longer after each failure."""
        pause = FIRST_RETRY_S
        while True:
            ending = self._status
            try:
                self._send()
                if ending:
                    self._client.set_terminated(self.state.run_id, status=ending)
                    return
                pause = FIRST_RETRY_S
                self._wake.wait()
                self._wake.clear()
            except Exception as error:  # noqa: BLE001 - whatever a server or a network does must not end the thread
                self._report(error)
                self._wake.wait(pause)
                self._wake.clear()
                pause = min(2 * pause, LAST_RETRY_S)

    def _report(self, error: Exception) -> None:
        if not self._warned:
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            logger.warning(
                "MLflow at %s: %s; training goes on, sending is tried again", self.target.resolved_uri(), reason
            )
        self._warned = True

    def _send(self) -> None:
        if self._client is None:
            self._client = self._connect()
        from mlflow.entities import Metric

        metrics: list[Any] = []
        offset, steps = self.state.offset, dict(self.state.last_steps)
        for line, behind in read_record(self.record, offset):
            offset = behind
            for name, value in line.get("metrics", {}).items():
                if line["step"] > steps.get(name, -1):
                    metrics.append(Metric(name, float(value), int(line["time"] * 1000), line["step"]))
                    steps[name] = line["step"]
            if len(metrics) >= BATCH:
                self._send_batch(metrics, offset, steps)
                metrics = []
        self._send_batch(metrics, offset, steps)

    def _send_batch(self, metrics: list[Any], offset: int, steps: dict[str, int]) -> None:
        for start in range(0, len(metrics), BATCH):
            batch = metrics[start : start + BATCH]
            if not self._accepted(batch):
                refused = sorted({metric.key for metric in batch if not self._accepted([metric])})
                logger.warning("MLflow refuses %s: only in %s", ", ".join(refused), self.record)
        self.state.offset, self.state.last_steps = offset, dict(steps)
        self._write_state()

    def _accepted(self, metrics: list[Any]) -> bool:
        """Send metrics; False where the server will never take them, whatever is tried again."""
        from mlflow.exceptions import MlflowException

        try:
            self._client.log_batch(self.state.run_id, metrics=metrics)
        except MlflowException as error:
            if error.error_code != "INVALID_PARAMETER_VALUE":
                raise
            return False
        return True

    def _connect(self) -> Any:
        """A client with this run open; makes the store, the experiment and the run where they do not exist."""
        for name, value in _QUIET.items():
            os.environ.setdefault(name, value)
        from mlflow import MlflowClient
        from mlflow.entities import Param

        logging.getLogger("mlflow").setLevel(logging.WARNING)  # how it makes its tables is no news
        uri = self.target.resolved_uri()
        is_local = uri.startswith("sqlite:")
        with _store_lock(Path(uri.removeprefix("sqlite:///")).parent) if is_local else nullcontext():
            client: Any = MlflowClient(tracking_uri=uri)
            known = client.get_experiment_by_name(self.target.experiment)
            place = (self.target.root.absolute() / "mlartifacts").as_uri() if is_local else None
            self.state.experiment_id = (
                known.experiment_id
                if known
                else client.create_experiment(self.target.experiment, artifact_location=place)
            )
        if self.state.run_id is not None and not _run_exists(client, self.state.run_id):
            logger.warning(
                "MLflow at %s does not know run %s any more: the whole record is sent as a new run",
                uri, self.state.run_id,
            )  # fmt: skip
            self.state = _State(experiment_id=self.state.experiment_id)
        if self.state.run_id is None:
            run = client.create_run(self.state.experiment_id, run_name=self.target.run_name, tags=dict(self.tags))
            self.state.run_id = run.info.run_id
            self._write_state()
        else:
            client.update_run(self.state.run_id, status="RUNNING")
        if not self.state.described:
            params = [Param(name, str(value)) for name, value in self.params.items()]
            for start in range(0, len(params), 100):
                client.log_batch(self.state.run_id, params=params[start : start + 100])
            for artifact in self.artifacts:
                client.log_artifact(self.state.run_id, str(artifact))
            self.state.described = True
            self._write_state()
        return client

    def _write_state(self) -> None:
        temporary = self.state_file.with_suffix(".tmp")
        temporary.write_text(json.dumps(asdict(self.state)))
        temporary.replace(self.state_file)


_QUIET = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",  # the thread tries again by itself
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "5",
}


def _set_aside(directory: Path) -> None:
    """Rename the record and the MLflow state of an earlier try to the first free number."""
    number = 1
    while (directory / f"metrics.{number}.jsonl").exists():
        number += 1
    for name, ending in (("metrics", "jsonl"), ("mlflow", "json")):
        if (directory / f"{name}.{ending}").exists():
            (directory / f"{name}.{ending}").rename(directory / f"{name}.{number}.{ending}")


def _run_exists(client: Any, run_id: str) -> bool:
    from mlflow.exceptions import MlflowException

    try:
        return bool(client.get_run(run_id).info.lifecycle_stage == "active")
    except MlflowException as error:
        if error.error_code == "RESOURCE_DOES_NOT_EXIST":
            return False
        raise


def _read_state(path: Path) -> _State:
    return _State(**json.loads(path.read_text())) if path.exists() else _State()


@contextmanager
def _store_lock(root: Path) -> Iterator[None]:
    """Several processes that create one SQLite store at the same time crash: one after the other."""
    root.mkdir(parents=True, exist_ok=True)
    with (root / ".mlflow.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
