"""ilvr_ds: train vision-language models to reason in interleaved text and latent visual tokens."""

__version__ = "0.1.0"
