"""What lmms-eval finds by the entry point `lmms_eval.models`: that `--model ilvr_ds` is LatentReasoner."""

from __future__ import annotations

from typing import Any


def manifest() -> Any:
    """The plug-in's manifest; lmms-eval calls this while it starts, so that the model's module is not loaded here."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest(
        model_id="ilvr_ds", chat_class_path="ilvr_ds.evaluation.harness.lmms_eval_model.LatentReasoner"
    )
