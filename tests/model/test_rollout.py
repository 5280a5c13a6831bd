"""The rollout equals a recompute of the whole prefix for each latent slot, in float64, and keeps what it says."""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ilvr_ds.config import LossConfig
from ilvr_ds.data.rollout import RolloutLayout
from ilvr_ds.data.window import MicroBatch, TokenBatch
from ilvr_ds.distill.stage2 import StageTwo
from ilvr_ds.model.families import family_of
from ilvr_ds.model.injection import write_images
from ilvr_ds.model.layers.cached_attention import use_cached_attention
from ilvr_ds.model.rollout import roll_out
from ilvr_ds.model.student import load_student
from tests.golden_set import GoldenSet, golden_set
from tests.model.recompute import recompute

MIXED = [5, 0, 2, 4]
"""Samples with 0, 3, 1 and 2 segments (of the stored set), with lengths from 82 to 647 tokens."""


@pytest.fixture(scope="module")
def golden() -> GoldenSet:
    return golden_set()


def model_of(golden: GoldenSet) -> Any:
    """The golden model in float64, its norms too: the stock ones round to float32 inside."""
    model = load_student(golden.model, torch.float64, len(golden.encoder.tokenizer))
    for module in list(model.model.language_model.modules()):
        for name, norm in module.named_children():
            if type(norm).__name__.endswith("RMSNorm"):
                exact = torch.nn.RMSNorm(norm.weight.shape, norm.variance_epsilon, dtype=torch.float64)
                exact.load_state_dict(norm.state_dict())
                setattr(module, name, exact)
    return model


def features_of(micro: MicroBatch, model: Any) -> Tensor:
    width = family_of(model.config).feature_width(model.config.vision_config)
    rows = int(micro.tokens.image_rows.max()) + 1
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(0)).double()


def layout_of(micro: MicroBatch) -> RolloutLayout:
    assert micro.rollout is not None
    return micro.rollout


def ce_and_grads(model: Any, hidden: Tensor, micro: MicroBatch) -> tuple[float, dict[str, Tensor]]:
    logits = model.lm_head(hidden.flatten(0, 1)[micro.label_rows])
    loss = torch.nn.functional.cross_entropy(logits, micro.label_ids, reduction="sum")
    model.zero_grad()
    loss.backward()
    return float(loss.detach()), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("is_recorded", [False, True], ids=["called", "recorded"])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("indices", [MIXED, [3], [5]], ids=["0, 3, 1 and 2 segments", "4 segments", "no segment"])
def test_equals_recomputing_every_prefix(golden: GoldenSet, indices: list[int], side: str, is_recorded: bool) -> None:
    """Loss and all gradients; catches wrong masks, positions, feedback columns, and gradients that are cut.

    Recorded passes run here as on a GPU, but for the recording.
    """
    assert_equals_recomputing(golden, indices, side, is_recorded)


def assert_equals_recomputing(
    golden: GoldenSet, indices: list[int], side: str, is_recorded: bool, checkpointing: bool = False
) -> None:
    model = model_of(golden)
    micro = golden.free_window(indices, len(indices), side).micro_batches[0]
    features, size = features_of(micro, model), golden.settings["latent_size"]
    wanted, expected, expected_grads = by_recomputing(golden, model, features, indices, side)
    stage = StageTwo(
        model, LossConfig(logits_chunk=5), 0, size, "full", checkpointing, has_recorded_latents=is_recorded
    )  # fmt: skip
    hidden = stage.train().hidden(micro, features)
    real = micro.tokens.real
    assert float((hidden[real] - wanted[real]).detach().abs().max()) < 1e-10
    actual, grads = ce_and_grads(model, hidden, micro)
    assert actual == pytest.approx(expected, rel=1e-12)
    assert set(grads) == set(expected_grads)
    for name, grad in grads.items():
        assert float((grad - expected_grads[name]).norm() / expected_grads[name].norm()) < 1e-8, name


def by_recomputing(
    golden: GoldenSet, model: Any, features: Tensor, indices: list[int], side: str
) -> tuple[Tensor, float, dict[str, Tensor]]:
    """States, loss and gradients with one pass over the prefix for each latent."""
    micro = golden.free_window(indices, len(indices), side).micro_batches[0]
    language_model = model.model.language_model
    embeddings = write_images(language_model.embed_tokens(micro.tokens.input_ids), micro.tokens, features)
    marked = golden.window(indices, len(indices), side).micro_batches[0]  # where a stage-1 batch has its latents
    slots, rows = marked.latent_slots, marked.sample_of_segment
    added = features if family_of(model.config).adds_features else None
    hidden = recompute(language_model, embeddings, micro.tokens, slots, rows, features=added)
    return hidden, *ce_and_grads(model, hidden, micro)


class Kept:
    """Bytes of the distinct storages that autograd keeps of what is computed inside the block."""

    def __enter__(self) -> Kept:
        self.storages: dict[int, tuple[Tensor, int]] = {}
        self.hooks = torch.autograd.graph.saved_tensors_hooks(self._note, lambda tensor: tensor)
        self.hooks.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self.hooks.__exit__(*error)

    def _note(self, tensor: Tensor) -> Tensor:
        self.storages[tensor.untyped_storage().data_ptr()] = tensor, tensor.untyped_storage().nbytes()
        return tensor

    @property
    def bytes(self) -> int:
        return sum(size for _, size in self.storages.values())


class Live(TorchDispatchMode):
    """Bytes of the storages made inside the block that are still alive."""

    def __init__(self) -> None:
        super().__init__()
        self.storages: dict[int, weakref.ref[Any]] = {}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                self.storages[storage._cdata] = weakref.ref(storage)
        return result

    @property
    def bytes(self) -> int:
        alive = (reference() for reference in self.storages.values())
        return sum(storage.nbytes() for storage in alive if storage is not None)


def test_keys_and_values_are_kept_once(golden: GoldenSet) -> None:
    """What a latent slot adds to memory does not grow with the text before it.

    Catches a cache that keeps a concatenation, or repeated heads, for every slot: stock caches do. Two prefixes that
    differ by `extra` tokens, each with the same slots behind it: the slots must cost the same.
    """
    model = model_of(golden)
    language_model = model.model.language_model
    use_cached_attention(language_model)
    costs = []
    for length in (20, 520):
        kept = []
        for slots in (1, 9):
            embeddings = torch.randn(1, length + slots + 1, 64, dtype=torch.float64, requires_grad=True)
            tokens, layout = one_segment(length, slots)
            with Kept() as memory:
                roll_out(language_model, embeddings, tokens, layout, slots, checkpointing=False)
            kept.append(memory.bytes)
        costs.append(kept[1] - kept[0])
    masks = 8 * (500 + 16) * 8  # a float64 for each column that a slot looks at, kept once for all layers, in 16s
    assert costs[1] - costs[0] <= masks
    one_copy = 8 * 500 * 2 * model.config.text_config.num_key_value_heads * 16 * 8
    assert one_copy > 20 * masks, "the bound could not tell"


def one_segment(length: int, slots: int) -> tuple[TokenBatch, RolloutLayout]:
    """One row: text of `length` tokens, one segment of `slots` latents, one token."""
    T = length + slots + 1
    columns, real = torch.arange(T)[None], torch.ones(1, T, dtype=torch.bool)
    none = torch.empty(0, dtype=torch.int64)
    tokens = TokenBatch(columns, columns.expand(3, 1, T), real, none, none)
    zero, pads = torch.zeros(1, dtype=torch.int64), length + torch.arange(slots)[None]
    return tokens, RolloutLayout(
        columns, real, columns, torch.tensor([[length - 1]]), zero, zero, pads, none, (length, 1)
    )


@pytest.mark.parametrize("side", ["left", "right"])
def test_checkpointing_keeps_inputs_keys_and_values_alone(golden: GoldenSet, side: str) -> None:
    """Same loss and gradients; of each layer's text only its input and its own keys and values live till the backward.

    Latent slots keep all they compute: they are few.
    """
    micro = golden.free_window(MIXED, len(MIXED), side).micro_batches[0]
    results = []
    for checkpointing in (False, True):
        model = model_of(golden).train()
        stage = StageTwo(model, LossConfig(), 0, golden.settings["latent_size"], "full", checkpointing)
        features = features_of(micro, model)
        with Live() as memory:
            hidden = stage.hidden(micro, features)
        before = memory.bytes
        results.append((*ce_and_grads(model, hidden, micro), before))
    (plain, plain_grads, plain_bytes), (loss, grads, kept_bytes) = results
    assert loss == pytest.approx(plain, rel=1e-12)
    for name, grad in grads.items():
        assert float((grad - plain_grads[name]).norm() / plain_grads[name].norm()) < 1e-12, name
    config, layout = model.config.text_config, layout_of(micro)
    B, text, D = len(layout.source), sum(layout.chunks), config.hidden_size
    head = D // config.num_attention_heads
    per_token = config.num_hidden_layers * (D + 2 * config.num_key_value_heads * head)
    slots = layout.rounds * golden.settings["latent_size"]
    everything_of_a_token = plain_bytes / (B * (text + slots))
    # besides: embeddings, states after the final norm and their copies, in the layout's order and the micro-batch's
    bound = 8 * B * text * (per_token + 12 * D) + 1.5 * B * slots * everything_of_a_token
    assert kept_bytes < bound < 0.7 * plain_bytes
