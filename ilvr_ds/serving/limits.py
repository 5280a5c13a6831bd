"""What a request may ask for, and what it gets where it does not say."""

from __future__ import annotations

from dataclasses import dataclass, field

from ilvr_ds.generation.settings import GenerationSettings


@dataclass(frozen=True)
class Limits:
    """Of one server."""

    images: int = 8
    """In a request, its earlier turns included."""
    image_bytes: int = 10 * 2**20
    """Of an encoded image."""
    image_pixels: int = 25_000_000
    """Of an image as it is stored; the model then makes it as small as it was trained on."""
    waiting: int = 64
    """Requests that wait for their turn."""
    batch_size: int = 8
    """Requests that are answered together."""
    url_hosts: frozenset[str] = frozenset()
    """Hosts from which images are fetched; none by itself."""
    generation: GenerationSettings = field(default_factory=GenerationSettings)
    """For requests that do not say; its `max_new_tokens` is the most that one may ask for."""

    @property
    def body_bytes(self) -> int:
        """Of a request: its images in base64, and 4 MiB of words."""
        return self.images * (self.image_bytes * 4 // 3 + 4) + 4 * 2**20
