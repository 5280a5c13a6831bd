"""Which attention runs, and that packed sequences do not see each other, whichever it is."""

from __future__ import annotations

import copy
import inspect
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers.integrations.flash_attention import flash_attention_forward

from ilvr_ds.errors import UserError
from ilvr_ds.model.injection import last_hidden
from ilvr_ds.model.layers import attention
from ilvr_ds.model.layers.attention import (
    PIECEWISE,
    VARLEN,
    attention_backend,
    attention_in_words,
    sequence_bounds,
    use_packed_attention,
    use_varlen_attention,
)
from ilvr_ds.model.student import load_student
from ilvr_ds.model.vision import VisionTower
from tests.golden_set import GoldenSet

LENGTHS = (5, 1, 130, 64)
HEADS, KV_HEADS, D = 4, 2, 16
GPU, CPU = torch.device("cuda"), torch.device("cpu")


@pytest.mark.parametrize(
    ("wanted", "dtype", "gpu", "installed", "backend"),
    [
        ("auto", torch.bfloat16, False, "234", "sdpa"),
        ("auto", torch.bfloat16, True, "", "sdpa"),
        ("auto", torch.float32, True, "234", "sdpa"),
        ("auto", torch.bfloat16, True, "234", "flash_attention_2"),
        ("auto", torch.float16, True, "3", "flash_attention_3"),
        ("auto", torch.float16, True, "4", "flash_attention_4"),
        ("sdpa", torch.bfloat16, True, "2", "sdpa"),
        ("varlen", torch.bfloat16, True, "2", "sdpa"),
        ("flash_attention_3", torch.float16, True, "23", "flash_attention_3"),
    ],
)
def test_auto_takes_whichever_flash_attention_can_run(
    wanted: str, dtype: torch.dtype, gpu: bool, installed: str, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    monkeypatch.setattr(attention, "_is_installed", lambda flash: flash[-1] in installed)
    assert attention_backend(wanted, dtype) == backend


@pytest.mark.parametrize("wanted", ["flash_attention_2", "varlen"])
@pytest.mark.parametrize(("dtype", "gpu"), [(torch.float32, True), (torch.bfloat16, False)])
def test_attention_by_name_that_cannot_run_is_refused(
    wanted: str, dtype: torch.dtype, gpu: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    with pytest.raises(UserError, match=rf"model\.attention is {wanted}: needs a GPU"):
        attention_backend(wanted, dtype)


def network(implementation: str) -> Any:
    return SimpleNamespace(config=SimpleNamespace(_attn_implementation=implementation))


@pytest.mark.parametrize(
    ("loaded", "wanted", "device", "dtype", "used"),
    [
        ("sdpa", "auto", CPU, torch.float32, PIECEWISE),
        ("sdpa", "auto", CPU, torch.bfloat16, PIECEWISE),
        ("sdpa", "auto", GPU, torch.float32, PIECEWISE),
        ("sdpa", "auto", GPU, torch.bfloat16, VARLEN),
        ("sdpa", "varlen", GPU, torch.float16, VARLEN),
        ("sdpa", "sdpa", GPU, torch.bfloat16, PIECEWISE),
        ("flash_attention_2", "auto", GPU, torch.bfloat16, "flash_attention_2"),
    ],
)
def test_packed_rows_get_the_fastest_attention_that_the_device_has(
    loaded: str, wanted: str, device: torch.device, dtype: torch.dtype, used: str
) -> None:
    model = network(loaded)
    use_packed_attention(model, wanted, device, dtype)
    assert model.config._attn_implementation == used
    assert attention_in_words(model) != VARLEN


@pytest.mark.parametrize(
    ("loaded", "device", "dtype", "used"),
    [
        ("sdpa", CPU, torch.bfloat16, "sdpa"),
        ("sdpa", GPU, torch.float32, "sdpa"),
        ("sdpa", GPU, torch.bfloat16, VARLEN),
        ("flash_attention_2", GPU, torch.bfloat16, "flash_attention_2"),
    ],
)
def test_a_tower_keeps_its_flash_attention(loaded: str, device: torch.device, dtype: torch.dtype, used: str) -> None:
    tower = network(loaded)
    use_varlen_attention(tower, device, dtype)
    assert tower.config._attn_implementation == used


def projections(dtype: torch.dtype, device: torch.device = CPU, d: int = D) -> list[torch.Tensor]:
    """Query, key and value of a packed row, [1, heads, tokens, d], with gradients."""
    draw = torch.Generator().manual_seed(3)
    shapes = [(1, heads, sum(LENGTHS), d) for heads in (HEADS, KV_HEADS, KV_HEADS)]
    return [torch.randn(s, generator=draw).to(device, dtype).requires_grad_() for s in shapes]


def alone(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, is_causal: bool) -> torch.Tensor:
    """The definition: every sequence by itself, heads repeated: [1, tokens, heads, d]."""
    key, value = (x.repeat_interleave(HEADS // KV_HEADS, dim=1) for x in (key, value))
    pieces = zip(*(x.split(LENGTHS, dim=2) for x in (query, key, value)), strict=True)
    outputs = [scaled_dot_product_attention(*piece, is_causal=is_causal, scale=0.3) for piece in pieces]
    return torch.cat(outputs, dim=2).transpose(1, 2)


def module(is_causal: bool) -> Any:
    return SimpleNamespace(is_causal=is_causal, num_key_value_groups=HEADS // KV_HEADS)


def bounds(device: torch.device = CPU) -> dict[str, Any]:
    starts = torch.tensor([0, *LENGTHS]).cumsum(0).to(device, torch.int32)
    longest = max(LENGTHS)
    return {
        "cu_seq_lens_q": starts, "cu_seq_lens_k": starts, "max_length_q": longest, "max_length_k": longest,
        "sequence_lengths": LENGTHS, "scaling": 0.3,
    }  # fmt: skip


@pytest.mark.parametrize("lengths", [(3, 7, 2), (7, 3), (2, 3, 7)])
@pytest.mark.parametrize("name", ["flash_attention_2", VARLEN, PIECEWISE])
def test_bounds_name_the_longest_sequence_wherever_it_stands(name: str, lengths: tuple[int, ...]) -> None:
    """flash-attn reads as far as max_length says: one that is too small leaves tokens out without a word."""
    starts = torch.tensor([0, *lengths]).cumsum(0).int()
    found = sequence_bounds(network(name), SimpleNamespace(cu_seqlens=starts, lengths=lengths))  # type: ignore[arg-type]
    assert found == {
        "cu_seq_lens_q": starts, "cu_seq_lens_k": starts, "max_length_q": 7, "max_length_k": 7,
        "sequence_lengths": lengths,
    }  # fmt: skip


@pytest.mark.parametrize("is_causal", [True, False])
def test_sequences_of_a_packed_row_do_not_see_each_other(is_causal: bool) -> None:
    packed, expected = projections(torch.float64), projections(torch.float64)
    output, _ = attention._attention_by_sequence(module(is_causal), *packed, None, **bounds())
    wanted = alone(*expected, is_causal)
    torch.testing.assert_close(output, wanted)
    weights = torch.randn_like(wanted)
    (output * weights).sum().backward()
    (wanted * weights).sum().backward()
    for ours, theirs in zip(packed, expected, strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad)


@pytest.mark.parametrize("is_causal", [True, False])
def test_varlen_attn_is_asked_for_what_is_meant(is_causal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a GPU: the call's arguments against the function's own description of them."""
    from torch.nn.attention import varlen

    signature = inspect.signature(varlen.varlen_attn)
    calls: list[dict[str, Any]] = []

    def recorded(*arguments: Any, **options: Any) -> torch.Tensor:
        calls.append(signature.bind(*arguments, **options).arguments)
        return arguments[0]

    monkeypatch.setattr(varlen, "varlen_attn", recorded)
    query, key, value = projections(torch.bfloat16)
    output, _ = attention._varlen_attention(module(is_causal), query, key, value, None, **bounds())
    [call] = calls
    assert torch.equal(output, query.transpose(1, 2))
    assert call["key"].shape == (sum(LENGTHS), KV_HEADS, D) and call["key"].is_contiguous()
    assert call["window_size"] == ((-1, 0) if is_causal else (-1, -1)) and call["scale"] == 0.3
    assert call["cu_seq_q"].tolist() == [0, 5, 6, 136, 200] and call["cu_seq_q"].dtype == torch.int32
    assert call["max_q"] == call["max_k"] == 130
    assert call.get("enable_gqa", True)


def record_varlen(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """The lengths of sequences of each call of the variable-length attention, which computes on a CPU from now on."""
    calls: list[tuple[int, ...]] = []

    def recorded(layer: Any, *operands: Any, cu_seq_lens_q: torch.Tensor, **options: Any) -> Any:
        calls.append(tuple(cu_seq_lens_q.diff().tolist()))
        options["sequence_lengths"] = calls[-1]
        return attention._attention_by_sequence(layer, *operands, **options)

    monkeypatch.setattr(attention, "_varlen_attention", recorded)
    return calls


MOVED = "transformers no longer calls what model/layers/attention.py registers, once a layer and with the bounds"


@torch.no_grad()
def test_a_language_model_calls_the_attention_that_its_configuration_names(
    golden: GoldenSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = record_varlen(monkeypatch)
    language_model = load_student(golden.model, torch.float32, 0).model.language_model
    tokens = golden.window([0, 1, 4], 3, "packed").tokens
    embeddings = torch.randn(*tokens.input_ids.shape, language_model.config.hidden_size)
    use_packed_attention(language_model, "auto", CPU, torch.float32)
    wanted = last_hidden(language_model, tokens, embeddings)
    use_packed_attention(language_model, "auto", GPU, torch.bfloat16)
    assert torch.equal(last_hidden(language_model, tokens, embeddings), wanted)
    assert calls == [tokens.lengths] * len(language_model.layers), MOVED


def test_a_tower_hands_over_all_windows_at_once(
    golden: GoldenSet, tower: VisionTower, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which it does where the name of its attention holds "flash"; else it walks through them in Python."""
    calls = record_varlen(monkeypatch)
    [images] = golden.window([1, 4], 2).images
    ours = copy.deepcopy(tower.tower)
    use_varlen_attention(ours, GPU, torch.bfloat16)
    features = VisionTower(ours, *(x.flatten().tolist() for x in (tower.mean, tower.std)))(images)
    torch.testing.assert_close(features, tower(images), rtol=1e-5, atol=1e-5)
    assert len(calls) == len(ours.blocks), MOVED  # type: ignore[arg-type]
    assert set(calls) == {tuple(x.diff().tolist()) for x in (images.cu_seqlens, images.cu_window_seqlens)}, MOVED


@pytest.mark.skipif(not torch.cuda.is_available(), reason="varlen_attn needs a GPU")
@pytest.mark.parametrize("is_causal", [True, False])
def test_varlen_attention_is_sdpa(is_causal: bool) -> None:
    packed = projections(torch.bfloat16, GPU)
    output, _ = attention._varlen_attention(module(is_causal), *packed, None, **bounds(GPU))
    assert_as_exact_as_sdpa(output, packed, is_causal)


@pytest.mark.parametrize(("d", "is_causal"), [(80, False), (128, True)], ids=["tower", "language-model"])
@pytest.mark.parametrize("flash", attention._FLASH)
def test_flash_attn_is_sdpa(flash: str, d: int, is_causal: bool) -> None:
    """Through transformers, as windows and packed rows call it. The tower is frozen: there only what it says counts.

    Catches bounds that do not arrive, so that samples of a row see each other.
    """
    if not (torch.cuda.is_available() and attention._is_installed(flash)):
        pytest.skip(f"needs a GPU and {flash}")
    packed = projections(torch.bfloat16, GPU, d)
    layer = module(is_causal)
    layer.config = network(flash).config
    output, _ = flash_attention_forward(layer, *packed, None, **bounds(GPU))
    assert_as_exact_as_sdpa(output, packed, is_causal, with_gradients=is_causal)


def assert_as_exact_as_sdpa(
    output: torch.Tensor, packed: list[torch.Tensor], is_causal: bool, with_gradients: bool = True
) -> None:
    """On a GPU in bf16: no further from float64 than twice what PyTorch's own SDPA in bf16 is."""
    plain = [x.detach().clone().requires_grad_() for x in packed]
    exact = [x.detach().double().requires_grad_() for x in packed]
    outputs = [output, alone(*plain, is_causal), alone(*exact, is_causal)]
    results = [[one] for one in outputs]
    if with_gradients:
        weights = torch.randn_like(outputs[2])
        for one, inputs, result in zip(outputs, (packed, plain, exact), results, strict=True):
            (one.double() * weights).sum().backward()
            result += [x.grad for x in inputs]
    for ours, sdpa, true in zip(*results, strict=True):
        assert (ours.double() - true).norm() < 2 * (sdpa.double() - true).norm() + 1e-3 * true.norm()
