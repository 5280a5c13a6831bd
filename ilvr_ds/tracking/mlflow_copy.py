"""Copies the record of a run to the MLflow server, each point once.

`metrics.jsonl` is the record; `mlflow.json` (mlflow_state.py) keeps the run's id and how far the copy has come. Retries
are harmless: a run is looked up by its key before it is created, points carry the record's times and the store drops
those it has, and a file lock lets one process send at a time.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from ilvr_ds.tracking.mlflow_parent import parent_run
from ilvr_ds.tracking.mlflow_state import (
    KEY_TAG,
    LEFT_TAG,
    PARENT_TAG,
    Status,
    TrackingTarget,
    read_state,
    write_state,
)
from ilvr_ds.tracking.names import sqlite_path, without_password
from ilvr_ds.tracking.record import read_record

logger = logging.getLogger("ilvr_ds")

BATCH = 500
"""Metrics per request: MLflow accepts up to 1,000; this many take under 0.1 s."""


class MlflowCopy:
    """Sends what the server lacks; raises whatever MLflow or the network raises."""

    def __init__(self, record: Path, state_file: Path, target: TrackingTarget) -> None:
        self.record, self.state_file, self.target = record, state_file, target
        self.state = read_state(state_file)
        self._client: Any = None

    def send(self) -> int:
        """Send every complete line not sent yet; returns the number of metrics sent."""
        with _lock(self.state_file.with_suffix(".lock")):
            self.state = read_state(self.state_file)  # another process may have sent in between
            if self._client is None:
                self._client = self._connect()
            self._send_params()
            self._send_tags()
            self._tell_left()
            sent = self._send_lines()
            self._send_artifacts()
            self._send_pictures()
        return sent

    def unsent(self) -> int:
        """Number of lines with metrics not sent yet."""
        return sum(1 for line, _ in read_record(self.record, self.state.offset) if "metrics" in line)

    def end(self, status: Status) -> None:
        """Mark the run as ended."""
        self._client.set_terminated(self.state.run_id, status=status)

    def mark_running(self) -> None:
        """Mark the run as running."""
        self._client.update_run(self.state.run_id, status="RUNNING")

    def _send_lines(self) -> int:
        from mlflow.entities import Metric

        metrics: list[Any] = []
        sent, offset, steps = 0, self.state.offset, dict(self.state.last_steps)
        for line, behind in read_record(self.record, offset):
            offset = behind
            if line.get("event") == "checkpoint":
                self._client.set_tag(self.state.run_id, "checkpoint", line["path"])
            for name, value in line.get("metrics", {}).items():
                if line["step"] > steps.get(name, -1):
                    metrics.append(Metric(name, float(value), int(line["time"] * 1000), line["step"]))
                    steps[name] = line["step"]
            if len(metrics) >= BATCH:
                self._send_batch(metrics, offset, steps)
                sent, metrics = sent + len(metrics), []
        self._send_batch(metrics, offset, steps)
        return sent + len(metrics)

    def _send_batch(self, metrics: list[Any], offset: int, steps: dict[str, int]) -> None:
        for start in range(0, len(metrics), BATCH):
            batch = metrics[start : start + BATCH]
            if refused := self._refused(metrics=batch):
                logger.warning("MLflow refuses %s; recorded in %s only", ", ".join(refused), self.record)
        if offset != self.state.offset:
            self.state.offset, self.state.last_steps = offset, dict(steps)
            write_state(self.state_file, self.state)

    def _refused(self, **content: list[Any]) -> list[str]:
        """Send `metrics` or `params`; returns the names that the server refuses even one at a time."""
        [(kind, entries)] = content.items()
        if self._accepted(**content):
            return []
        return sorted({entry.key for entry in entries if not self._accepted(**{kind: [entry]})})

    def _accepted(self, **content: list[Any]) -> bool:
        """Send one batch; False if the server will never accept it, so that a retry is no use."""
        from mlflow.exceptions import MlflowException

        try:
            self._client.log_batch(self.state.run_id, **content)
        except MlflowException as error:
            if error.error_code != "INVALID_PARAMETER_VALUE":
                raise
            return False
        return True

    def _connect(self) -> Any:
        """A client; creates the store, the experiment and the run where they are missing."""
        for name, value in _QUIET.items():
            os.environ.setdefault(name, value)
        from mlflow import MlflowClient

        logging.getLogger("mlflow").setLevel(logging.WARNING)  # it reports how it creates its tables
        uri = self.target.resolved_uri()
        database = sqlite_path(uri)
        with _store_lock(database.parent) if database else nullcontext():
            client: Any = MlflowClient(tracking_uri=uri)
            known = client.get_experiment_by_name(self.target.experiment)
            place = (self.target.root.absolute() / "mlartifacts").as_uri() if database else None
            self.state.experiment_id = (
                known.experiment_id
                if known
                else client.create_experiment(self.target.experiment, artifact_location=place)
            )
        if self.state.run_id is not None and not _run_exists(client, self.state.run_id):
            logger.warning(
                "MLflow at %s no longer knows run %s: the whole record is sent as a new run",
                without_password(uri), self.state.run_id,
            )  # fmt: skip
            self.state = self.state.restarted()
        if self.target.parent is not None:
            experiment, server = str(self.state.experiment_id), without_password(uri)
            self.state.tags[PARENT_TAG] = parent_run(
                client, experiment, self.target.parent, self.target.root, server, _run_exists
            )
        if self.state.run_id is None:
            write_state(self.state_file, self.state)  # the key must be on disk before a run carries it
            self.state.run_id = self._find_run(client) or self._make_run(client)
        write_state(self.state_file, self.state)
        return client

    def _find_run(self, client: Any) -> str | None:
        """The run with this key, created in an attempt whose answer was lost."""
        found = client.search_runs([self.state.experiment_id], f"tags.`{KEY_TAG}` = '{self.state.key}'")
        return str(found[0].info.run_id) if found else None

    def _make_run(self, client: Any) -> str:
        tags = {**self.state.tags, KEY_TAG: self.state.key}
        run = client.create_run(self.state.experiment_id, run_name=self.target.run_name, tags=tags)
        return str(run.info.run_id)

    def _send_params(self) -> None:
        from mlflow.entities import Param

        if self.state.described:
            return
        params = [Param(name, value) for name, value in self.state.params.items()]
        for start in range(0, len(params), 100):
            if refused := self._refused(params=params[start : start + 100]):  # MLflow never changes a parameter
                logger.warning("MLflow keeps %s of run %s unchanged", ", ".join(refused), self.state.run_id)
        if self.state.datasets:
            self._client.log_inputs(
                self.state.run_id, datasets=[_dataset_input(entry) for entry in self.state.datasets]
            )
        self.state.described = True
        write_state(self.state_file, self.state)

    def _send_tags(self) -> None:
        """Tags describe the last start: the number of ranks, for one, may have changed."""
        from mlflow.entities import RunTag

        if self.state.tagged:
            return
        tags = {**self.state.tags, "attempt": str(self.state.attempt)}
        self._client.log_batch(self.state.run_id, tags=[RunTag(name, value) for name, value in tags.items()])
        self.state.tagged = True
        write_state(self.state_file, self.state)

    def _tell_left(self) -> None:
        """Rename and tag the run that this one leaves: MLflow cannot delete its later points."""
        if self.state.left is None:
            return
        run_id, step = self.state.left.run_id, self.state.left.step
        if _run_exists(self._client, run_id):
            is_open = self._client.get_run(run_id).info.status == "RUNNING"  # it was killed before it could end
            name = f"{self.state.run_name} (left after step {step})"
            self._client.update_run(run_id, "KILLED" if is_open else None, name)
            self._client.set_tag(run_id, LEFT_TAG, str(self.state.run_id))
        self.state.left = None
        write_state(self.state_file, self.state)

    def _send_artifacts(self) -> None:
        """The last start's. Files come last: a broken artifact store does not hold up the curves."""
        if self.state.filed:
            return
        for name in self.state.artifacts:
            self._client.log_artifact(self.state.run_id, str(self.record.parent / name))
        self.state.filed = True
        write_state(self.state_file, self.state)

    def _send_pictures(self) -> None:
        """Send each picture once: one whose answer was lost is found by its name in the store."""
        from PIL import Image

        folder = self.record.with_name(self.record.stem.replace("metrics", "pictures", 1))
        there: list[str] | None = None
        for line, behind in read_record(self.record, self.state.picture_offset):
            if line.get("event") != "picture" or line["step"] <= self.state.last_pictures.get(line["key"], -1):
                continue
            key, step, time_ms = line["key"], line["step"], int(line["time"] * 1000)
            if there is None:
                there = [file.path for file in self._client.list_artifacts(self.state.run_id, "images")]
            name = f"images/{key.replace('/', '~')}+step+{step}+timestamp+{time_ms}+"
            if not (folder / line["file"]).is_file():
                logger.warning("%s is missing: not sent to MLflow", folder / line["file"])
            elif not any(path.startswith(name) for path in there):
                with Image.open(folder / line["file"]) as image:
                    self._client.log_image(self.state.run_id, image, key=key, step=step, timestamp=time_ms)
            self.state.picture_offset = behind
            self.state.last_pictures[key] = step
            write_state(self.state_file, self.state)


_QUIET = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",  # the sender retries by itself
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "5",
}


def _dataset_input(entry: dict[str, Any]) -> Any:
    from mlflow.entities import Dataset, DatasetInput, InputTag

    source, profile = json.dumps({"uri": entry["source"]}), json.dumps(entry["profile"])
    dataset = Dataset(entry["name"], entry["digest"], "local", source, profile=profile)
    return DatasetInput(dataset, [InputTag("mlflow.data.context", entry["context"])])


def _run_exists(client: Any, run_id: str) -> bool:
    from mlflow.exceptions import MlflowException

    try:
        return bool(client.get_run(run_id).info.lifecycle_stage == "active")
    except MlflowException as error:
        if error.error_code == "RESOURCE_DOES_NOT_EXIST":
            return False
        raise


@contextmanager
def _lock(path: Path) -> Iterator[None]:
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError as error:  # some network file systems have no locks; the store still drops duplicates
            logger.debug("%s: no lock (%s)", path, error)
        yield


@contextmanager
def _store_lock(root: Path) -> Iterator[None]:
    """One process at a time: several that create the same SQLite store at once crash."""
    root.mkdir(parents=True, exist_ok=True)
    with (root / ".mlflow.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
