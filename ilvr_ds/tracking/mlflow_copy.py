"""MLflow's door: copies the record of a run to the tracking server, each point once.

`metrics.jsonl` is the record; `mlflow.json` beside it remembers what the run is called there and how far the copy is.
Whatever is tried again does no harm: a run is found by its key before it is made, points carry the time of the record
and a store drops a point that it has, and a lock lets one process send at a time.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import re
import secrets
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from ilvr_ds.tracking.mlflow_parent import parent_run
from ilvr_ds.tracking.names import sqlite_path, sqlite_uri
from ilvr_ds.tracking.record import read_record

logger = logging.getLogger("ilvr_ds")

BATCH = 500
"""Metrics of one request: MLflow takes up to 1,000; a request of this size takes under 0.1 s."""
KEY_TAG = "ilvr_ds.key"
PARENT_TAG = "mlflow.parentRunId"
WENT_BACK_TAG, LEFT_TAG = "ilvr_ds.went_back_from", "ilvr_ds.left_for"
"""Of a run that went back to an older step: the run that it left; and of that run: which one left it."""
Status = Literal["FINISHED", "FAILED", "KILLED"]


@dataclass(frozen=True)
class TrackingTarget:
    """Where the copy goes. `uri` None: MLFLOW_TRACKING_URI, else a SQLite file in `root`."""

    uri: str | None
    experiment: str
    run_name: str
    root: Path
    parent: str | None = None
    """Name of a run above this one, which other runs in `root` may have too."""

    def resolved_uri(self) -> str:
        """The tracking address, absolute."""
        return self.uri or os.environ.get("MLFLOW_TRACKING_URI") or sqlite_uri(self.root / "mlflow.db")


def without_password(uri: str) -> str:
    """The address as it may be written down."""
    return uri if sqlite_path(uri) else re.sub(r"//[^/@]*@", "//", uri)


@dataclass(frozen=True)
class LeftRun:
    """A run of the server that goes no further: another goes on from one of its steps."""

    run_id: str
    step: int


@dataclass
class CopyState:
    """What mlflow.json holds: what the run is, and how far the copy is."""

    key: str = field(default_factory=lambda: uuid.uuid4().hex)
    """Tag of the run: an answer that got lost does not make a second run."""
    uri: str = ""
    """Where the copy goes, without a password."""
    experiment: str = ""
    run_name: str = ""
    parent: str | None = None
    """Name of the run above this one."""
    params: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    artifacts: list[str] = field(default_factory=list)
    """Names of files beside the record, or paths."""
    datasets: list[dict[str, Any]] = field(default_factory=list)
    """Of each data set: name, digest, source, context (training or evaluation) and profile (counts)."""
    left: LeftRun | None = None
    """The run that this one leaves, as long as it does not know."""
    attempt: int = 0
    """How often the run was started."""
    run_id: str | None = None
    experiment_id: str | None = None
    described: bool = False
    """Parameters, data sets and artifacts are there."""
    tagged: bool = False
    """The tags of the last start are there."""
    offset: int = 0
    last_steps: dict[str, int] = field(default_factory=dict)
    """The last step sent of each metric: steps that are trained again after a crash are not sent again."""
    picture_offset: int = 0
    last_pictures: dict[str, int] = field(default_factory=dict)
    """The last step sent of each picture."""

    def restarted(self) -> CopyState:
        """The same run with nothing sent yet."""
        progress = ("run_id", "described", "tagged", "offset", "last_steps", "picture_offset", "last_pictures")
        return CopyState(**{name: value for name, value in vars(self).items() if name not in progress})


def read_state(path: Path) -> CopyState:
    """The state in a file; a new one where there is none."""
    if not path.exists():
        return CopyState()
    content = json.loads(path.read_text())
    left = content.pop("left", None)
    return CopyState(**content, left=LeftRun(**left) if left else None)


def write_state(path: Path, state: CopyState) -> None:
    """Replace the file as a whole."""
    temporary = path.with_suffix(f".{secrets.token_hex(4)}.tmp")
    try:
        temporary.write_text(json.dumps(asdict(state)))
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)  # a full disk: it is tried again and again


class MlflowCopy:
    """Sends what the server does not have yet; raises whatever MLflow or the network raises."""

    def __init__(self, record: Path, state_file: Path, target: TrackingTarget) -> None:
        self.record, self.state_file, self.target = record, state_file, target
        self.state = read_state(state_file)
        self._client: Any = None

    def send(self) -> int:
        """Send all whole lines of the record that were not sent; returns the number of metrics that were."""
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
        """Lines with metrics that were not sent."""
        return sum(1 for line, _ in read_record(self.record, self.state.offset) if "metrics" in line)

    def end(self, status: Status) -> None:
        """Mark the run as ended."""
        self._client.set_terminated(self.state.run_id, status=status)

    def mark_running(self) -> None:
        """Mark the run as one that goes on."""
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
                logger.warning("MLflow refuses %s: only in %s", ", ".join(refused), self.record)
        if offset != self.state.offset:
            self.state.offset, self.state.last_steps = offset, dict(steps)
            write_state(self.state_file, self.state)

    def _refused(self, **content: list[Any]) -> list[str]:
        """Send `metrics` or `params`; the names of those that the server does not take, alone either."""
        [(kind, entries)] = content.items()
        if self._accepted(**content):
            return []
        return sorted({entry.key for entry in entries if not self._accepted(**{kind: [entry]})})

    def _accepted(self, **content: list[Any]) -> bool:
        """Send them; False where the server will never take them together, whatever is tried again."""
        from mlflow.exceptions import MlflowException

        try:
            self._client.log_batch(self.state.run_id, **content)
        except MlflowException as error:
            if error.error_code != "INVALID_PARAMETER_VALUE":
                raise
            return False
        return True

    def _connect(self) -> Any:
        """A client; makes the store, the experiment and the run where they do not exist."""
        for name, value in _QUIET.items():
            os.environ.setdefault(name, value)
        from mlflow import MlflowClient

        logging.getLogger("mlflow").setLevel(logging.WARNING)  # how it makes its tables is no news
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
                "MLflow at %s does not know run %s any more: the whole record is sent as a new run",
                without_password(uri), self.state.run_id,
            )  # fmt: skip
            self.state = self.state.restarted()
        if self.target.parent is not None:
            experiment, server = str(self.state.experiment_id), without_password(uri)
            self.state.tags[PARENT_TAG] = parent_run(
                client, experiment, self.target.parent, self.target.root, server, _run_exists
            )
        if self.state.run_id is None:
            write_state(self.state_file, self.state)  # the key must be known before a run has it
            self.state.run_id = self._find_run(client) or self._make_run(client)
        write_state(self.state_file, self.state)
        return client

    def _find_run(self, client: Any) -> str | None:
        """The run of this key, which was made though the answer never came."""
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
            if refused := self._refused(params=params[start : start + 100]):  # it never changes a parameter
                logger.warning("MLflow keeps %s of run %s as before", ", ".join(refused), self.state.run_id)
        if self.state.datasets:
            self._client.log_inputs(
                self.state.run_id, datasets=[_dataset_input(entry) for entry in self.state.datasets]
            )

    def _send_tags(self) -> None:
        """Tags are of the last start: the number of ranks, say, may be another."""
        from mlflow.entities import RunTag

        if self.state.tagged:
            return
        tags = {**self.state.tags, "attempt": str(self.state.attempt)}
        self._client.log_batch(self.state.run_id, tags=[RunTag(name, value) for name, value in tags.items()])
        self.state.tagged = True
        write_state(self.state_file, self.state)

    def _tell_left(self) -> None:
        """The run that this one leaves gets a name and a tag that say so: MLflow deletes no points of it."""
        if self.state.left is None:
            return
        run_id, step = self.state.left.run_id, self.state.left.step
        if _run_exists(self._client, run_id):
            is_open = self._client.get_run(run_id).info.status == "RUNNING"  # it was killed
            name = f"{self.state.run_name} (left after step {step})"
            self._client.update_run(run_id, "KILLED" if is_open else None, name)
            self._client.set_tag(run_id, LEFT_TAG, str(self.state.run_id))
        self.state.left = None
        write_state(self.state_file, self.state)

    def _send_artifacts(self) -> None:
        """Files come last: a store for files that is out of order does not hold up the curves."""
        if self.state.described:
            return
        for name in self.state.artifacts:
            self._client.log_artifact(self.state.run_id, str(self.record.parent / name))
        self.state.described = True
        write_state(self.state_file, self.state)

    def _send_pictures(self) -> None:
        """Like artifacts, each once: one whose answer got lost is found by its name in the store."""
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
                logger.warning("%s is gone: not sent to MLflow", folder / line["file"])
            elif not any(path.startswith(name) for path in there):
                with Image.open(folder / line["file"]) as image:
                    self._client.log_image(self.state.run_id, image, key=key, step=step, timestamp=time_ms)
            self.state.picture_offset = behind
            self.state.last_pictures[key] = step
            write_state(self.state_file, self.state)


_QUIET = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",  # who sends tries again by itself
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
        except OSError as error:  # some network file systems have none; the store still drops points that it has
            logger.debug("%s: no lock (%s)", path, error)
        yield


@contextmanager
def _store_lock(root: Path) -> Iterator[None]:
    """Several processes that create one SQLite store at the same time crash: one after the other."""
    root.mkdir(parents=True, exist_ok=True)
    with (root / ".mlflow.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
