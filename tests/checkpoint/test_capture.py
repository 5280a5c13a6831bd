"""What DeepSpeed hands over when it saves: through the checkpoint engine that is exchanged meanwhile."""

from __future__ import annotations

import inspect
from typing import Any

import deepspeed
import pytest
from deepspeed.runtime.checkpoint_engine.checkpoint_engine import CheckpointEngine
from deepspeed.runtime.engine import DeepSpeedEngine

from ilvr_ds.checkpoint.capture import _Capture, student_files

MOVED = f"DeepSpeed {deepspeed.__version__}: %s; see student_files in ilvr_ds/checkpoint/capture.py"


@pytest.mark.parametrize("name", ["_save_checkpoint", "_save_zero_checkpoint"])
def test_deepspeed_still_writes_through_its_checkpoint_engine(name: str) -> None:
    """Catches a release that writes files by itself: a checkpoint would lack them."""
    function = getattr(DeepSpeedEngine, name, None)
    assert function is not None, MOVED % f"the engine has no {name}"
    assert {"checkpoint_engine", "save"} <= set(function.__code__.co_names), MOVED % f"{name} writes another way"


@pytest.mark.parametrize("name", ["create", "save", "load", "commit"])
def test_the_stand_in_takes_what_the_checkpoint_engine_takes(name: str) -> None:
    theirs, ours = (inspect.signature(getattr(c, name)) for c in (CheckpointEngine, _Capture))
    assert list(theirs.parameters) == list(ours.parameters), MOVED % f"CheckpointEngine.{name} takes {theirs}"


def test_the_checkpoint_engine_comes_back_though_saving_fails() -> None:
    class Student:
        checkpoint_engine: Any = "its own"

        def save_checkpoint(self, *_: Any, **__: Any) -> None:
            assert isinstance(self.checkpoint_engine, _Capture)
            raise OSError("no room")

    student = Student()
    with pytest.raises(OSError, match="no room"):
        student_files(student)
    assert student.checkpoint_engine == "its own"
