"""DeepSpeed's door: the engines of student and teacher, their settings, their shards."""

import sys
from contextlib import suppress
from unittest.mock import patch

# What DeepSpeed imports for things that nobody calls here would be a third of a rank's start: MLflow for its autotuner,
# and torch's compiler, to which ZeRO-3 hands the functions of an optimizer (Muon).
_is_blocked = "mlflow" not in sys.modules
if _is_blocked:
    sys.modules["mlflow"] = None  # type: ignore[assignment]
try:
    import deepspeed
    from deepspeed.runtime import compiler

    with patch.object(compiler, "compile", lambda: compiler.dummy_decorator), suppress(ImportError):
        import deepspeed.runtime.zero.muon.original_muon  # noqa: F401 - a release without it has nothing to be spared
finally:
    if _is_blocked:
        del sys.modules["mlflow"]
