"""Released models by the names that people call them, and their sizes."""

from __future__ import annotations

from typing import Any

from ilvr_ds.model.families import FAMILIES, family_of
from ilvr_ds.model.sizes import Geometry


def geometry_of(config: Any) -> Geometry:
    """The sizes in a transformers configuration of one of the families."""
    return family_of(config).geometry(config)


KNOWN = {
    name: family.geometry(family.config_of(release)) for family in FAMILIES for name, release in family.releases.items()
}
"""Sizes of released models, from their configurations"""
HUB_NAMES = {name: release.hub_name for family in FAMILIES for name, release in family.releases.items()}
"""Where each of KNOWN is published"""
RELEASES = {name: hub.partition("/")[2].removesuffix("-Instruct").lower() for name, hub in HUB_NAMES.items()}
"""What a path of one holds, in lower case"""
