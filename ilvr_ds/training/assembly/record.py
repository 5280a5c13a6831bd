"""The record of a run: its parameters, tags and data sets, and how it begins where a run goes on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ilvr_ds import dist
from ilvr_ds.checkpoint.files import saved_state
from ilvr_ds.checkpoint.find import branches_off, is_of_run, remember, set_aside_newer
from ilvr_ds.config import Recipe
from ilvr_ds.data.mixture import Mixture
from ilvr_ds.data.shards import ShardSet
from ilvr_ds.engine.settings import deepspeed_settings
from ilvr_ds.errors import UserError
from ilvr_ds.provenance import environment, machine
from ilvr_ds.tracking.mlflow_state import PARENT_TAG, read_state
from ilvr_ds.tracking.tracker import Tracker, TrackingTarget
from ilvr_ds.training.assembly.inputs import Inputs
from ilvr_ds.training.assembly.start import Start
from ilvr_ds.whole_files import write_whole


def open_tracker(recipe: Recipe, file_settings: dict[str, Any], inputs: Inputs, start: Start) -> Tracker:
    """The run's record (collective). The first to change the run's folder: all has been checked.

    The main rank writes the resolved settings, and where the run computes, beside the record. Raises UserError.
    """
    checkpoint, initial = start.checkpoint, start.initial
    parent = dist.decided_by_main(lambda: _mlflow_run(initial)) if initial else None
    is_own = checkpoint is not None and is_of_run(recipe, checkpoint)
    branches = dist.decided_by_main(lambda: branches_off(recipe))
    if checkpoint:
        dist.decided_by_main(lambda: set_aside_newer(recipe, checkpoint))
    here = environment(dist.gather_on_host(machine(dist.device())))
    deepspeed_json = deepspeed_settings(recipe, file_settings)
    settings = {"recipe.json": recipe.to_dict(), "deepspeed.json": deepspeed_json, "environment.json": here}
    dist.decided_by_main(lambda: _write_settings(recipe.run_dir, settings))
    tracking = recipe.tracking
    tracker = Tracker(
        recipe.run_dir,
        TrackingTarget(
            tracking.uri, tracking.experiment, recipe.run.name, Path(recipe.run.output_dir), tracking.parent
        ),
        params={**recipe.flat(), **_flat("ds", deepspeed_json)},
        tags=_tags(recipe, inputs.training, here) | ({PARENT_TAG: parent} if parent else {}),
        datasets=[*_dataset_entries("training", inputs.training), *_dataset_entries("evaluation", inputs.held_out)],
        artifacts=[recipe.run_dir / name for name in settings],
        is_writer=dist.is_main(),
        goes_on=is_own or (checkpoint is not None and not branches),
        back_to=start.state["loader"]["step"] if is_own and branches else None,
        run_id=start.state.get("mlflow_run_id") if is_own else None,  # from another run's checkpoint: a new run
    )
    dist.decided_by_main(lambda: remember(recipe, checkpoint))
    return tracker


def _tags(recipe: Recipe, data: Mixture, here: dict[str, Any]) -> dict[str, str]:
    """MLflow's tags; here: what `environment` says."""
    return {
        "stage": str(recipe.train.stage),
        "base_model": recipe.model.path,
        "world_size": str(dist.world_size()),
        "data": data.location,
        "data.fingerprint": data.fingerprint,
        "host": here["ranks"][0]["host"],
        "hosts": ", ".join(sorted({rank["host"] for rank in here["ranks"]})),
        "device": here["ranks"][0]["device"],
        "command": here["command"],
        "git.commit": here["git_commit"],
        "git.dirty": str(here["git_dirty"]).lower(),
        **{f"version.{name}": found for name, found in here["versions"].items()},
    }


def _mlflow_run(checkpoint: Path) -> str | None:
    """MLflow's id of a checkpoint's run: the copy's, which may have come after the checkpoint."""
    return read_state(checkpoint.parent.parent / "mlflow.json").run_id or saved_state(checkpoint).get("mlflow_run_id")


def _dataset_entries(context: str, data: Mixture | None) -> list[dict[str, Any]]:
    """An entry for each data set; in a mixture it has the set's name."""
    if data is None:
        return []
    return [_dataset_entry(context, shards, name) for shards, name in zip(data.sets, data.names, strict=True)]


def _dataset_entry(context: str, shards: ShardSet, name: str) -> dict[str, Any]:
    """What MLflow is told of a data set; its digest is short, the whole fingerprint is in the profile."""
    manifest = shards.manifest
    return {
        "name": name or manifest.name,
        "digest": shards.fingerprint[:12],
        "source": shards.location,
        "context": context,
        "profile": {
            "samples": manifest.samples,
            "groups": manifest.groups,
            "size_bytes": manifest.size_bytes,
            "rejected": manifest.rejected,
            "longest_tokens": manifest.longest_tokens,
            "fingerprint": shards.fingerprint,
        },
    }


def _flat(prefix: str, value: Any) -> dict[str, Any]:
    """Nested settings as dotted names."""
    if not isinstance(value, dict):
        return {prefix: value}
    return {name: leaf for key, inner in value.items() for name, leaf in _flat(f"{prefix}.{key}", inner).items()}


def _write_settings(directory: Path, settings: dict[str, Any]) -> None:
    try:
        directory.mkdir(parents=True, exist_ok=True)
        for name, content in settings.items():
            write_whole(directory / name, json.dumps(content, indent=1) + "\n")
    except OSError as error:
        raise UserError(f"run.output_dir: cannot write to {directory} ({error.strerror})") from error
