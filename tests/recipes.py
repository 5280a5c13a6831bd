"""The recipes that tests begin with."""

from __future__ import annotations

from tests.forks import ROOT

RECIPE = str(ROOT / "launch/recipes/demo.yaml")
"""The demo's: an hour of a large model in a minute of a tiny one."""
REQUIRED = {"run": {"name": "r"}, "data": {"shards": "s"}, "model": {"path": "m"}, "deepspeed": {"config": "d"}}
"""The keys that have no default, and no more."""
