from __future__ import annotations

from tests.generation.conftest import golden, golden_model, reasoner

__all__ = ["golden", "golden_model", "reasoner"]
