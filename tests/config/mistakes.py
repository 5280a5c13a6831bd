"""A recipe in a temporary file, and the one line that a mistake in it gives."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from ilvr_ds.config import Recipe
from ilvr_ds.errors import UserError

Load = Callable[..., Recipe]
MINIMAL = """\
run:
  name: r
data: {shards: s}
model: {path: m}
deepspeed: {config: d.json}
"""


def mistake(load: Load, *arguments: Any, **more: Any) -> str:
    with pytest.raises(UserError) as caught:
        load(*arguments, **more)
    message = str(caught.value)
    assert "\n" not in message
    return message
