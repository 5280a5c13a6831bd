"""ilvr_ds: train vision-language models to reason in interleaved text and latent visual tokens.

`docs/python.md` has the interface for programs: `load`, `judge`, `decode_image`, `pack_samples`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ilvr_ds.api import Model, Reply, decode_image, judge, load, pack_samples

__version__ = "0.1.0"
__all__ = ["Model", "Reply", "__version__", "decode_image", "judge", "load", "pack_samples"]


def __getattr__(name: str) -> Any:
    """The interface, imported when it is used: commands and `--help` start without torch."""
    if name in __all__:
        from ilvr_ds import api

        return getattr(api, name)
    raise AttributeError(f"module 'ilvr_ds' has no attribute '{name}'")
