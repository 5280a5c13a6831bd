"""A decoder's steps, without graphs, beside the plain loop: the same tokens in float32, whatever stands beside them."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

from ilvr_ds.generation import decoder, refill
from ilvr_ds.generation.context import Context
from ilvr_ds.generation.decoder import Decoder
from ilvr_ds.generation.generate import Generator
from ilvr_ds.generation.latent_sources import Constant, FirstRepeated, HalfOwn, LatentSource, Markers, Noise
from ilvr_ds.generation.loading import load_reasoner
from ilvr_ds.generation.refill import Refill, Request
from ilvr_ds.generation.row_modes import Barred
from ilvr_ds.generation.settings import GenerationSettings
from tests.qwen3_set import qwen3_set, with_latent_tokens

if TYPE_CHECKING:
    from ilvr_ds.data.template import EncodedSample
    from ilvr_ds.generation.answers import Answer
    from ilvr_ds.generation.loading import Reasoner
    from tests.golden_set import GoldenSet

CPU = torch.device("cpu")


@pytest.fixture(scope="module", params=["qwen2_5_vl", "qwen3_vl"])
def plain(request: Any, golden: GoldenSet, golden_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Reasoner:
    """Random weights that open segments and end turns by themselves."""
    folder, seed, size = golden_model, 1, 8
    if request.param == "qwen3_vl":
        seed, size = 3, 3
        made = tmp_path_factory.mktemp("qwen3")
        folder = with_latent_tokens(qwen3_set(made / "base"), made / "model")
    reasoner = load_reasoner(str(folder), CPU, "fp32", latent_size=3)
    weight = reasoner.model.lm_head.weight.data
    generator = torch.Generator().manual_seed(seed)
    scale = weight.std() * size
    for token in (reasoner.special.latent_start, reasoner.special.im_end):
        weight[token] = scale * torch.randn(weight.shape[1], generator=generator)
    return reasoner


@pytest.fixture(scope="module")
def prompts(plain: Reasoner, golden: GoldenSet) -> list[EncodedSample]:
    return [plain.encoder.prompt(sample) for sample in golden.samples]


@pytest.fixture(scope="module")
def decoding(plain: Reasoner) -> Reasoner:
    return dataclasses.replace(plain, decoder=Decoder(plain))


@pytest.fixture
def answers(plain: Reasoner, prompts: list[EncodedSample]) -> Iterator[Any]:
    yield lambda settings, *more: Generator(plain, settings, *more)(prompts).answers


def same(found: list[Answer], expected: list[Answer]) -> None:
    for one, other in zip(found, expected, strict=True):
        assert dataclasses.replace(one, latents=()) == dataclasses.replace(other, latents=())
        assert [len(x) for x in one.latents] == [len(x) for x in other.latents]
        for x, y in zip(one.latents, other.latents, strict=True):
            torch.testing.assert_close(x, y, rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_batch_is_answered_as_by_the_plain_loop(
    decoding: Reasoner, prompts: list[EncodedSample], answers: Any, temperature: float
) -> None:
    forced = {5: decoding.special.latent_start} if temperature else {}
    settings = GenerationSettings(60, temperature, 0.95, seed=1, keep_latents=True, forced=forced)
    expected = answers(settings)
    assert any(answer.segments for answer in expected) and len({len(a.tokens) for a in expected}) > 1
    same(Generator(decoding, settings)(prompts).answers, expected)


@pytest.mark.parametrize("settings", [{"temperature": 1e-300}, {"temperature": 1.0, "top_p": 1e-300}], ids=str)
def test_a_trace_of_chance_is_none(
    decoding: Reasoner, prompts: list[EncodedSample], answers: Any, settings: dict[str, float]
) -> None:
    """In float32 both numbers are 0: logits over the one are no numbers, and no token is before the other."""
    greedy = answers(GenerationSettings(8))
    for reasoner in (decoding, dataclasses.replace(decoding, decoder=None)):
        same(Generator(reasoner, GenerationSettings(8, **settings))(prompts).answers, greedy)


@pytest.mark.parametrize("rows", [1, 2, 3])
def test_rows_that_end_are_given_the_next_prompt(
    decoding: Reasoner, prompts: list[EncodedSample], answers: Any, rows: int
) -> None:
    """Catches what the row before has left behind, a row that moves without its columns, and answers of others."""
    settings = GenerationSettings(40, 1.0, 0.95, seed=1, keep_latents=True)
    expected = answers(settings)
    assert decoding.decoder is not None
    answering = Refill(decoding.decoder, settings, look_every=5)
    for order in (range(len(prompts)), range(len(prompts))[::-1]):
        found = dict(answering((Request(prompts[number], 40) for number in order), rows))
        same([found[order.index(number)] for number in range(len(prompts))], expected)


def test_each_request_has_its_own_limit(decoding: Reasoner, prompts: list[EncodedSample], answers: Any) -> None:
    settings = GenerationSettings(30, keep_latents=True)
    limits = [3 + 4 * number for number in range(len(prompts))]
    assert decoding.decoder is not None
    requests = [Request(prompt, limit) for prompt, limit in zip(prompts, limits, strict=True)]
    found = dict(Refill(decoding.decoder, settings)(requests, 4))
    for number, (whole, limit) in enumerate(zip(answers(settings), limits, strict=True)):
        assert found[number].tokens == whole.tokens[:limit]
        assert found[number].hit_limit == (whole.hit_limit or len(whole.tokens) > limit)


def test_rows_get_more_columns_when_they_need_them(
    plain: Reasoner, prompts: list[EncodedSample], answers: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches columns that are lost or shifted when they move, and numbers to sample by that begin anew."""
    monkeypatch.setattr(refill, "ROOM", 4)
    monkeypatch.setattr(decoder, "GRAIN", 8)
    settings = GenerationSettings(40, 1.0, 0.95, seed=1, keep_latents=True)
    found = Decoder(plain)
    columns: list[int] = []
    reserve = Decoder.reserve

    def noting(self: Decoder, rows: int, more: int, keeps: bool = True) -> Any:
        columns.append(more)
        return reserve(self, rows, more, keeps)

    monkeypatch.setattr(Decoder, "reserve", noting)
    short_first = sorted(range(len(prompts)), key=lambda n: len(prompts[n].input_ids))
    answered = dict(Refill(found, settings)((Request(prompts[n], 40) for n in short_first), 2))
    same([answered[short_first.index(n)] for n in range(len(prompts))], answers(settings))
    assert len(columns) > 3


@pytest.mark.parametrize("keeps", [True, False])
def test_memory_that_ends_while_columns_grow_leaves_no_mixture(
    plain: Reasoner, prompts: list[EncodedSample], answers: Any, keeps: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches layers of the old size beside one of the new, after an error that a server survives: wrong answers."""
    settings = GenerationSettings(20, 1.0, 0.95, seed=1, keep_latents=True)
    found = Decoder(plain)
    requests = [Request(prompt, 20) for prompt in prompts]
    dict(Refill(found, settings)(requests, 2))
    new_zeros, layers = torch.Tensor.new_zeros, iter([True, False])

    def scarce(like: torch.Tensor, *shape: Any, **named: Any) -> torch.Tensor:
        if len(torch.Size(*shape) if len(shape) == 1 else shape) == 5 and not next(layers):
            raise torch.OutOfMemoryError("no memory for the second layer")
        return new_zeros(like, *shape, **named)

    with monkeypatch.context() as patch, pytest.raises(torch.OutOfMemoryError):
        patch.setattr(torch.Tensor, "new_zeros", scarce)
        found.reserve(2, found.columns + 1, keeps)
    answered = dict(Refill(found, settings)(requests, 2))
    same([answered[number] for number in range(len(prompts))], answers(settings))


def test_a_queue_is_asked_again_while_others_are_answered(
    decoding: Reasoner, prompts: list[EncodedSample], answers: Any
) -> None:
    """Two wait at first, and two come when the first of them has been answered."""
    settings = GenerationSettings(20, 1.0, 0.95, seed=1)
    waiting = prompts[:2]
    asked: list[int] = []

    def take(most: int) -> list[EncodedSample]:
        asked.append(most)
        taken, waiting[:] = waiting[:most], waiting[most:]
        return taken

    found = {}
    for number, answer in Generator(decoding, settings).queue(take, 2):
        if not found:
            waiting.extend(prompts[2:4])
        found[number] = answer
    same([found[n] for n in range(4)], answers(settings)[:4])
    assert max(asked) <= 2 and min(asked) >= 0


@pytest.mark.parametrize("barred", [None, "image", "prompt", "image_for_words"])
def test_other_latents_and_barred_sight_from_a_context_that_is_shared(
    plain: Reasoner, decoding: Reasoner, prompts: list[EncodedSample], barred: Barred | None
) -> None:
    """What an audit asks for, whose answers all go on from prompts that were read once."""
    settings = GenerationSettings(16, forced={2: plain.special.latent_start}, keep_latents=True)
    width = plain.model.config.text_config.hidden_size
    ids = [prompt.id for prompt in prompts]
    contexts = [Context(reasoner, prompts, settings.max_new_tokens) for reasoner in (plain, decoding)]
    for number in range(5):

        def source(number: int = number) -> LatentSource | None:
            made = (None, Constant(torch.zeros(width)), Noise(ids, 1, CPU), FirstRepeated(), HalfOwn())
            return made[number]

        found, expected = (
            Generator(reasoner, settings, source(), barred=barred)(prompts, context).answers
            for reasoner, context in zip((decoding, plain), contexts, strict=True)
        )
        same(found, expected)


def test_what_was_barred_in_a_row_before_is_in_sight_again(
    plain: Reasoner, decoding: Reasoner, prompts: list[EncodedSample]
) -> None:
    """A long prompt, and then a short one in the same row, whose answer stands where the long one was barred."""
    settings = GenerationSettings(
        40, forced={2: plain.special.latent_start}, forbidden=plain.stop_ids, keep_latents=True
    )
    short, *_, long = sorted(prompts, key=lambda prompt: len(prompt.input_ids))
    assert len(long.input_ids) > len(short.input_ids) + 8
    for prompt in (long, short):
        expected, found = (
            Generator(reasoner, settings, barred="prompt")([prompt]).answers for reasoner in (plain, decoding)
        )
        same(found, expected)


def test_a_row_that_a_stop_string_ends_at_its_last_column_writes_into_no_other(
    plain: Reasoner, prompts: list[EncodedSample], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The longest of four is over when its columns are full; the others go on, the next row right behind it."""
    monkeypatch.setattr(refill, "ROOM", 4)
    monkeypatch.setattr(decoder, "GRAIN", 1)
    settings = GenerationSettings(24, 1.0, seed=1, forbidden=(*plain.stop_ids, plain.special.latent_start))
    longest = sorted(prompts, key=lambda prompt: len(prompt.input_ids), reverse=True)[:4]
    begins = Generator(plain, settings)(longest[:1]).answers[0].tokens[:4]
    stop = plain.encoder.tokenizer.decode(begins, skip_special_tokens=True)
    settings = dataclasses.replace(settings, stop=(stop,))
    expected = Generator(plain, settings)(longest).answers
    assert not expected[0].hit_limit and all(answer.hit_limit for answer in expected[1:])
    found = dict(Refill(Decoder(plain), settings, look_every=2)((Request(prompt, 24) for prompt in longest), 4))
    same([found[number] for number in range(4)], expected)


def test_a_row_that_is_over_still_sees_a_column(
    plain: Reasoner, decoding: Reasoner, prompts: list[EncodedSample], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its prompt was barred, and it has no other column any more."""
    seen: list[torch.Tensor] = []
    attend = decoder.attend_by_mask
    monkeypatch.setattr(decoder, "attend_by_mask", lambda mask, dtype: seen.append(mask) or attend(mask, dtype))
    special = plain.special
    settings = GenerationSettings(
        24, 1.0, seed=1, forced={0: special.latent_start}, forbidden=(*plain.stop_ids, special.latent_start)
    )
    free = Generator(plain, settings, barred="prompt")(prompts[:4]).answers
    settings = dataclasses.replace(settings, stop=(free[1].text[2:5],))
    expected = Generator(plain, settings, barred="prompt")(prompts[:4]).answers
    assert not expected[1].hit_limit and sum(answer.hit_limit for answer in expected) > 2
    same(Generator(decoding, settings, barred="prompt")(prompts[:4]).answers, expected)
    assert len(seen) >= 24 and all(mask.any(1).all() for mask in seen)


def test_markers_stop_strings_and_streamed_text(
    plain: Reasoner, decoding: Reasoner, prompts: list[EncodedSample], answers: Any
) -> None:
    settings = GenerationSettings(24, 1.0, seed=1, forced={1: plain.special.latent_start}, keep_latents=True)
    free = answers(settings)
    words = [a.text[n : n + 2] for a in free for n in range(4, len(a.text) - 2) if a.text[n : n + 2].isascii()]
    stopped = dataclasses.replace(settings, stop=(words[0], words[-1]))
    for changed in (settings, stopped):
        expected = Generator(plain, changed, Markers())(prompts).answers
        same(Generator(decoding, changed, Markers())(prompts).answers, expected)
    pieces: dict[int, list[str]] = {number: [] for number in range(len(prompts))}
    shown = Generator(decoding, stopped, on_text=lambda row, piece: pieces[row].append(piece))(prompts).answers
    same(shown, answers(stopped))
    assert ["".join(parts) for parts in pieces.values()] == [answer.text.rstrip("\ufffd") for answer in shown]
    assert any(a.tokens != b.tokens for a, b in zip(shown, free, strict=True)), "a stop string must have come"


def test_speed_counts_tokens_once(decoding: Reasoner, prompts: list[EncodedSample]) -> None:
    generated = Generator(decoding, GenerationSettings(max_new_tokens=5))(prompts)
    assert generated.speed.prefill_tokens == sum(len(prompt.input_ids) for prompt in prompts)
    assert generated.speed.decode_tokens == sum(len(answer.tokens) for answer in generated.answers)


def test_projections_keep_their_weights_in_no_more_memory(plain: Reasoner, decoding: Reasoner) -> None:
    attention = plain.model.model.language_model.layers[0].self_attn
    parts = [attention.q_proj.weight, attention.k_proj.weight, attention.v_proj.weight]
    assert len({part.untyped_storage().data_ptr() for part in parts}) == 1
    assert sum(part.numel() for part in parts) * 4 == parts[0].untyped_storage().nbytes()
