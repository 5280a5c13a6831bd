from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tests.golden_set import GoldenSet


@pytest.fixture(scope="session")
def golden() -> GoldenSet:
    """The stored golden set: tokenizer, image processor and samples. Imported late, because transformers is slow."""
    from tests.golden_set import DEFAULT, GoldenSet

    return GoldenSet(DEFAULT)
