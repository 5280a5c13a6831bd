"""Sizes of the language models of Qwen2.5-VL."""

from __future__ import annotations

from ilvr_ds.planning.geometry import KNOWN

TEXT = {
    name: {
        "hidden_size": known.text.hidden_size,
        "num_hidden_layers": known.text.layers,
        "num_attention_heads": known.text.heads,
        "num_key_value_heads": known.text.kv_heads,
        "intermediate_size": known.text.intermediate_size,
        "vocab_size": known.text.vocab_size,
    }
    for name, known in KNOWN.items()
    if not known.text.has_head_norms
}
TINY = {"hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 1, "num_key_value_heads": 1,
        "intermediate_size": 256, "vocab_size": 512}  # fmt: skip
"""Runs anywhere; good for nothing but to see that a benchmark runs."""
ROPE = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]}
