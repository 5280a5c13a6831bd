"""How much memory answers take, and so how many can be decoded together."""

from __future__ import annotations

import torch

from ilvr_ds.generation.decoder import GRAIN, Decoder
from ilvr_ds.generation.prefill import TOKENS_AT_ONCE
from ilvr_ds.generation.row_state import LOOK_EVERY

MOST_ROWS = 256
"""More rows make a step longer and a token hardly cheaper."""
_SPARE = 0.05
"""Of the device: what the driver, its libraries and fragments take."""


def bytes_of_answers(decoder: Decoder, rows: int, columns: int) -> int:
    """Of everything but weights: keys and values, what a step makes and keeps, and the largest pass over prompts."""
    columns = -(-columns // GRAIN) * GRAIN
    config, size = decoder.language_model.config, decoder.embed.weight.element_size()
    width, vocabulary = config.hidden_size, decoder.head.weight.shape[0]
    state = rows * (columns * 5 + (LOOK_EVERY + 2) * width * size)
    step = rows * (vocabulary * size + 4 * config.intermediate_size * size)
    return int(decoder.bytes_of(rows, columns) + state + step + _bytes_of_reading(decoder))


def bytes_of_weights(decoder: Decoder) -> int:
    """Of the model and its tower."""
    modules = (decoder.reasoner.model, decoder.reasoner.tower)
    return sum(weight.numel() * weight.element_size() for module in modules for weight in module.parameters())


def _bytes_of_reading(decoder: Decoder) -> int:
    """Of a pass of the most tokens: its keys and values, and what one layer makes of them."""
    config = decoder.language_model.config
    numbers = TOKENS_AT_ONCE * (4 * config.intermediate_size + 4 * config.hidden_size)
    return decoder.bytes_of(1, TOKENS_AT_ONCE) + int(numbers * decoder.embed.weight.element_size())


def rows_that_fit(decoder: Decoder, columns: int) -> int:
    """A power of two, at most MOST_ROWS and at least 1, of rows that fit beside the weights on a GPU."""
    device = decoder.reasoner.device
    room = (1 - _SPARE) * torch.cuda.get_device_properties(device).total_memory - bytes_of_weights(decoder)
    rows = MOST_ROWS
    while rows > 1 and bytes_of_answers(decoder, rows, columns) > room:
        rows //= 2
    return rows
