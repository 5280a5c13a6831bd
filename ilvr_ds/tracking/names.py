"""Names of metrics: kinds of task are free text, names of MLflow metrics are not."""

from __future__ import annotations

import hashlib
import re

LONGEST = 250
"""Characters of a name that MLflow takes."""
_REFUSED = re.compile(r"[^\w\-. :]")
"""MLflow takes letters and digits of every script, these marks, and "/", which parts names into groups."""


def metric_name(prefix: str, kind: str) -> str:
    """`prefix`/`kind`; a kind that MLflow refuses is rewritten, with a piece of its sha256, so that none share a name.

    A kind has the same name whatever kinds are beside it.
    """
    plain = _REFUSED.sub("_", kind)
    whole = f"{prefix}/{plain}"
    if plain == kind and kind not in ("", ".", "..") and len(whole) <= LONGEST:
        return whole
    piece = f"-{hashlib.sha256(kind.encode()).hexdigest()[:8]}"
    return f"{prefix}/{plain or 'none'}"[: LONGEST - len(piece)] + piece
