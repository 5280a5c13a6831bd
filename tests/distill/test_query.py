from __future__ import annotations

import copy
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLTextConfig
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLTextModel
from transformers.models.qwen3_vl.configuration_qwen3_vl import Qwen3VLTextConfig
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLTextModel

from ilvr_ds.data.collate import Collator
from ilvr_ds.data.images import VisionLayout
from ilvr_ds.data.template import EncodedSample
from ilvr_ds.data.tokens import SpecialTokens
from ilvr_ds.distill import query
from ilvr_ds.distill.query import Context, ContextEncoder
from ilvr_ds.model.layers.attention import use_packed_attention

PAD_LATENT, START, END, OPEN, CLOSE, VISION_START, VISION_END, IMAGE, PADDING = range(50, 59)
SPECIAL = SpecialTokens(PAD_LATENT, START, END, OPEN, CLOSE, VISION_START, VISION_END, IMAGE, PADDING)
SKIPPED = (PAD_LATENT, START, END, VISION_START, VISION_END)
LAYOUT = VisionLayout(patch_size=2, merge_size=2, window_size=8)
K, D, HEADS, KV_HEADS = 3, 32, 4, 2
ADDED = 2
"""Layers behind which Qwen3-VL adds features."""
SEGMENT = [START, *[PAD_LATENT] * K, END]


def picture(tokens: int) -> list[int]:
    return [VISION_START, *[IMAGE] * tokens, VISION_END]


SEQUENCES = [
    # system and user turn, assistant turn
    ([OPEN, 1, CLOSE, OPEN, 2, *picture(4), 3, 4, *picture(2), 5, CLOSE], [OPEN, 6, 7, *SEGMENT, 8, 9, *SEGMENT, 10]),
    ([OPEN, 11, CLOSE, OPEN, 12, 13, 14, CLOSE], [OPEN, 6, *SEGMENT, 15, CLOSE]),
    ([OPEN, 2, *picture(8), 16, CLOSE], [OPEN, 6, 17, *SEGMENT, *SEGMENT, 18, *SEGMENT, CLOSE]),
    ([OPEN, 19, 20, CLOSE], [OPEN, 6, 21, CLOSE]),
]
"""Two images; none; one of more tokens, and steps without text between them; neither image nor segment."""
IMAGES = [[(2, 8), (2, 4)], [], [(4, 8)], []]
"""Grids in patches, four patches to a token."""


def sample(number: int) -> EncodedSample:
    prompt, turn = SEQUENCES[number]
    ids = np.array(prompt + turn)
    grids = IMAGES[number] + [(2, 4)] * turn.count(START)
    return EncodedSample(
        id=str(number),
        group="",
        input_ids=ids,
        labels=np.full(len(ids), -100),
        position_ids=np.tile(np.arange(len(ids)), (3, 1)),
        assistant=len(prompt),
        segments=np.flatnonzero(ids == START) + 1,
        answer=(0, 0),
        patches=tuple(np.zeros((h * w, 12), dtype=np.uint8) for h, w in grids),
        grids=tuple(grids),
        num_input_images=len(IMAGES[number]),
    )


def image_features(number: int) -> Tensor:
    """Random features of a sample's input images [image tokens, (1 + ADDED) D]."""
    tokens = SEQUENCES[number][0].count(IMAGE)
    return torch.randn(tokens, (1 + ADDED) * D, generator=torch.Generator().manual_seed(100 + number))


@pytest.fixture(scope="module", params=["qwen2_5_vl", "qwen3_vl"])
def encoder(request: pytest.FixtureRequest) -> ContextEncoder:
    sizes: dict[str, Any] = {
        "vocab_size": 64,
        "hidden_size": D,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
    }
    rope = {"rope_type": "default", "rope_theta": 1e4}
    torch.manual_seed(0)
    model: Any
    if request.param == "qwen2_5_vl":
        config = Qwen2_5_VLTextConfig(**sizes, rope_parameters={**rope, "mrope_section": [2, 1, 1]})
        model = Qwen2_5_VLTextModel._from_config(config, attn_implementation="sdpa")
    else:
        wide = Qwen3VLTextConfig(**sizes, head_dim=12, rope_parameters={**rope, "mrope_section": [2, 2, 2]})
        model = Qwen3VLTextModel._from_config(wide, attn_implementation="sdpa")
    for name, parameter in model.named_parameters():  # biases too; far from the flat attention of a fresh model
        torch.nn.init.normal_(parameter, std=2.0 if name.endswith(("q_norm.weight", "k_norm.weight")) else 0.5)
    return ContextEncoder(model.eval())


def run(encoder: ContextEncoder, side: Any, *pieces: range) -> tuple[Context, list[tuple[int, int]]]:
    """The encoder on all samples, two in a micro-batch; and (sample, segment) of each of its segments."""
    samples = [sample(n) for n in range(len(SEQUENCES))]
    window = Collator(SPECIAL, LAYOUT, K, 256, side)(samples, np.arange(len(samples)), [2] * (len(samples) // 2))
    torch.manual_seed(1)
    features = []
    for first in (0, 2):  # as the collator lays them: input images, then helper images, or one grey image
        members = range(first, first + 2)
        helpers = sum(2 * len(samples[n].segments) for n in members)
        features += [*(image_features(n) for n in members), torch.randn(helpers, (1 + ADDED) * D)]
    counts: dict[int, int] = {}
    order = []
    for number in window.context.sample.tolist():
        order.append((number, counts.setdefault(number, 0)))
        counts[number] += 1
    width = (1 + ADDED * has_norms(encoder)) * D
    return encoder(window.tokens, torch.cat(features)[:, :width], window.context, pieces), order


def has_norms(encoder: ContextEncoder) -> bool:
    """Whether the model is a Qwen3-VL, which has norms on queries and keys."""
    return isinstance(encoder.language_model, Qwen3VLTextModel)


def alone(encoder: ContextEncoder, number: int) -> tuple[Tensor, Tensor]:
    """Last hidden states and input embeddings [T, D] of one sample without padding, by the stock model."""
    model = encoder.language_model
    ids = torch.tensor(SEQUENCES[number][0] + SEQUENCES[number][1])
    with torch.no_grad():
        embeddings = model.embed_tokens(ids)
        features, *added = image_features(number).split(D, dim=1)
        embeddings[ids == IMAGE] = features
        deepstack: dict[str, Any] = {}
        if has_norms(encoder) and len(features):
            model = copy.deepcopy(model)
            vars(model).pop("_deepstack_process", None)  # the stock one
            deepstack = {"visual_pos_masks": (ids == IMAGE)[None], "deepstack_visual_embeds": added}
        hidden = model(inputs_embeds=embeddings[None], use_cache=False, **deepstack).last_hidden_state[0]
    return hidden.double(), embeddings.double()


def user_context(encoder: ContextEncoder, number: int) -> Tensor:
    """One head, one prompt token, one image token at a time."""
    hidden, embeddings = alone(encoder, number)
    prompt = SEQUENCES[number][0]
    images = [t for t, token in enumerate(prompt) if token == IMAGE]
    words = [t for t, token in enumerate(prompt) if token != IMAGE and token not in SKIPPED]
    if not images:
        return embeddings[words].mean(0)
    attention = encoder.language_model.layers[-1].self_attn
    width = attention.head_dim
    q, k = (
        (hidden @ projection.weight.double().T).view(len(hidden), -1, width)
        for projection in (attention.q_proj, attention.k_proj)
    )
    if has_norms(encoder):
        q, k = (
            x / (x.square().mean(-1, keepdim=True) + norm.variance_epsilon).sqrt() * norm.weight.double()
            for x, norm in ((q, attention.q_norm), (k, attention.k_norm))
        )
    else:
        q, k = (
            x + projection.bias.double().view(-1, width)
            for x, projection in ((q, attention.q_proj), (k, attention.k_proj))
        )
    weights = torch.zeros(len(images), dtype=torch.float64)
    for head in range(HEADS):
        for r in words:
            logits = torch.stack([q[r, head] @ k[i, head // (HEADS // KV_HEADS)] / width**0.5 for i in images])
            weights += logits.softmax(0) / (HEADS * len(words))
    weights /= weights.sum()
    from_images = torch.stack([weight * hidden[i] for weight, i in zip(weights, images, strict=True)]).sum(0)
    return (from_images + hidden[words].mean(0)) / 2


def step_text(encoder: ContextEncoder, number: int, segment: int) -> Tensor | None:
    """Mean state of the text between the segment before, or the assistant's opening, and this one."""
    hidden, _ = alone(encoder, number)
    prompt, turn = SEQUENCES[number]
    ids = prompt + turn
    starts = [t for t, token in enumerate(ids) if token == START]
    first = len(prompt) if segment == 0 else starts[segment - 1]
    words = [t for t in range(first, starts[segment]) if ids[t] not in SKIPPED]
    return hidden[words].mean(0) if words else None


@pytest.mark.parametrize("side", ["right", "left"])
def test_the_user_context_is_that_of_a_loop_over_samples(encoder: ContextEncoder, side: str) -> None:
    found, _ = run(encoder, side)
    assert found.user.dtype == torch.float32
    for number in range(len(SEQUENCES)):
        # float32 in a padded batch against one sample at a time
        torch.testing.assert_close(found.user[number].double(), user_context(encoder, number), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("side", ["right", "left"])
def test_the_step_text_is_that_of_a_loop_over_segments(encoder: ContextEncoder, side: str) -> None:
    found, order = run(encoder, side)
    assert sorted(order) == [(0, 0), (0, 1), (1, 0), (2, 0), (2, 1), (2, 2)]
    for row, (number, segment) in enumerate(order):
        wanted = step_text(encoder, number, segment)
        assert bool(found.has_step[row]) == (wanted is not None)
        wanted = torch.zeros(D, dtype=torch.float64) if wanted is None else wanted
        torch.testing.assert_close(found.step[row].double(), wanted, rtol=1e-4, atol=1e-5)
    assert found.has_step.tolist().count(False) == 1, "the second segment of sample 2 has no text before it"


def test_the_loop_would_tell_a_flat_attention(encoder: ContextEncoder) -> None:
    hidden, _ = alone(encoder, 0)
    prompt = SEQUENCES[0][0]
    images = [t for t, token in enumerate(prompt) if token == IMAGE]
    words = [t for t, token in enumerate(prompt) if token != IMAGE and token not in SKIPPED]
    flat = (hidden[images].mean(0) + hidden[words].mean(0)) / 2
    assert (user_context(encoder, 0) - flat).abs().max() > 0.01


def test_attention_in_chunks_is_the_same(encoder: ContextEncoder, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, _ = run(encoder, "right")
    calls, mass = [], query._attention_mass

    def counted(*arguments: Any) -> Tensor:
        calls.append(1)
        return mass(*arguments)

    monkeypatch.setattr(query, "_attention_mass", counted)
    for elements, chunks in ((1, 4), (3 * 9 * 8 * HEADS, 2)):
        monkeypatch.setattr(query, "ATTENTION_ELEMENTS", elements)
        calls.clear()
        found, _ = run(encoder, "right")
        assert len(calls) == chunks
        torch.testing.assert_close(found.user, whole.user, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("elements", [9 * 8 * HEADS, 3 * 8 * HEADS, 8 * HEADS])
def test_the_attention_of_one_sample_is_cut_too(
    encoder: ContextEncoder, monkeypatch: pytest.MonkeyPatch, elements: int
) -> None:
    """Catches a limit that a long prompt with large images exceeds many times, alone."""
    whole, _ = run(encoder, "right")
    sizes, softmax = [], Tensor.softmax

    def measured(logits: Tensor, *arguments: Any) -> Tensor:
        sizes.append(logits.numel())
        return softmax(logits, *arguments)

    monkeypatch.setattr(Tensor, "softmax", measured)
    monkeypatch.setattr(query, "ATTENTION_ELEMENTS", elements)
    found, _ = run(encoder, "right")
    assert max(sizes) <= elements
    torch.testing.assert_close(found.user, whole.user, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("side", ["packed", "right", "left"])
@pytest.mark.parametrize("cuts", [(0, 4), (0, 2, 4), (0, 1, 4), (0, 1, 2, 3, 4)])
def test_a_window_in_pieces_reads_the_same(encoder: ContextEncoder, side: str, cuts: tuple[int, ...]) -> None:
    """And the model never sees more than a piece: catches memory that grows with accumulation."""
    encoder = copy.deepcopy(encoder)
    if side == "packed":
        use_packed_attention(encoder.language_model, "sdpa", torch.device("cpu"), torch.float32)
    pieces = [range(first, last) for first, last in pairwise(cuts)]
    whole, _ = run(encoder, side)
    sizes: list[int] = []

    def seen(_: Any, __: Any, inputs: dict[str, Any]) -> None:
        sizes.append(inputs["inputs_embeds"].shape[0] * inputs["inputs_embeds"].shape[1])

    hook = encoder.language_model.register_forward_pre_hook(seen, with_kwargs=True)
    found, _ = run(encoder, side, *pieces)
    hook.remove()
    lengths = [len(prompt) + len(turn) for prompt, turn in SEQUENCES]
    wide = lengths if side == "packed" else [max(lengths)] * len(lengths)
    assert sizes == [sum(wide[n] for n in samples) for samples in pieces]
    for one, other in zip(found, whole, strict=True):
        if len(pieces) == 1:
            assert torch.equal(one, other)
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
