"""DeepSpeed's door: the engines of student and teacher, their settings, their shards."""

import sys

if "mlflow" not in sys.modules:  # DeepSpeed's autotuner, which nobody calls, would import it: a fifth of a rank's start
    sys.modules["mlflow"] = None  # type: ignore[assignment]
    try:
        import deepspeed  # noqa: F401
    finally:
        del sys.modules["mlflow"]
