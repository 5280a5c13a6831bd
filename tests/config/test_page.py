from __future__ import annotations

from dataclasses import fields

from ilvr_ds.config import DataSetConfig, Recipe
from ilvr_ds.config.page import settings_page
from tests.ranks import ROOT


def test_the_page_of_settings_is_current() -> None:
    """After a change of sections.py or limits.py: ilvr-ds settings > docs/settings.md"""
    assert (ROOT / "docs/settings.md").read_text() == settings_page()


def test_every_key_has_a_row_with_its_meaning() -> None:
    """Catches a key without a text below it, which would have no row, or an empty one."""
    rows = [line for line in settings_page().splitlines() if line.startswith("| `")]
    assert len(rows) == len(Recipe().flat()) + len(fields(DataSetConfig))
    assert all(len(row.split(" | ")) >= 4 and not row.endswith(" |  |") for row in rows)


def test_values_are_said_as_a_recipe_has_them() -> None:
    page = settings_page()
    for row in (
        "| `lr` | number, 0 to 1000 | `1e-05` | Peak learning rate. |",
        "| `eval_shards` | text or null | null |",
        "| `offload` | `cpu`, `none` | `cpu` |",
        "| `latent_gradient` | `full`, `detached` or integer, 1 to 65,536 | `detached` |",
        "| `packing` | true or false | `true` |",
        "| `name` | text | required |",
    ):
        assert row in page
