from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor

from ilvr_ds.data.sample import IMAGE_MARKER
from ilvr_ds.generation import generate
from ilvr_ds.generation.answers import RowReader
from ilvr_ds.generation.context import Context
from ilvr_ds.generation.generate import Generator
from ilvr_ds.generation.latent_sources import Constant, Markers
from ilvr_ds.generation.row_modes import Barred
from ilvr_ds.generation.settings import GenerationSettings
from ilvr_ds.model.injection import write_images
from tests.golden_set import DEFAULT

if TYPE_CHECKING:
    from ilvr_ds.data.template import EncodedSample
    from ilvr_ds.generation.answers import Answer
    from ilvr_ds.generation.loading import Reasoner
    from tests.golden_set import GoldenSet


@pytest.fixture(scope="module")
def prompts(golden: GoldenSet, reasoner: Reasoner) -> list[EncodedSample]:
    return [reasoner.encoder.prompt(sample) for sample in golden.samples]


def as_in_the_golden_set(golden: GoldenSet, reasoner: Reasoner, **changes: Any) -> GenerationSettings:
    """algorithm: greedy, latent_start forced at new tokens 2 and 20, the ends of turn and text forbidden."""
    start = reasoner.special.latent_start
    forbidden = tuple(golden.settings["special_ids"][name] for name in ("<|im_end|>", "<|endoftext|>"))
    count = golden.expected[f"{golden.samples[0].id}.gen.new_ids"].shape[-1]
    return GenerationSettings(
        **{"max_new_tokens": count, "forced": {2: start, 20: start}, "forbidden": forbidden, **changes}
    )


def expected(golden: GoldenSet) -> list[list[int]]:
    return [golden.expected[f"{sample.id}.gen.new_ids"].flatten().tolist() for sample in golden.samples]


@pytest.fixture(scope="module")
def golden_prompts(golden: GoldenSet, reasoner: Reasoner, prompts: list[EncodedSample]) -> list[EncodedSample]:
    """The prompts that the released code generated from.

    It ignores `<image>` markers when it generates, and leaves them in as text, although it trained with them.
    """
    changed = []
    for prompt in prompts:
        ids = golden.expected[f"{prompt.id}.gen.prompt_ids"].flatten().numpy()
        positions = reasoner.encoder.positions(ids, list(prompt.grids))
        changed.append(dataclasses.replace(prompt, input_ids=ids, position_ids=positions))
    return changed


def test_prompts_are_what_the_model_was_trained_on(golden: GoldenSet, prompts: list[EncodedSample]) -> None:
    for prompt, sample in zip(prompts, golden.samples, strict=True):
        trained = golden.expected[f"{prompt.id}.input_ids"].flatten().tolist()
        real = golden.expected[f"{prompt.id}.attention_mask"].flatten().bool().tolist()
        trained = [token for token, is_real in zip(trained, real, strict=True) if is_real]
        assert prompt.input_ids.tolist() == trained[: len(prompt.input_ids)]
        if IMAGE_MARKER not in sample.question:
            assert prompt.input_ids.tolist() == golden.expected[f"{prompt.id}.gen.prompt_ids"].flatten().tolist()


def test_one_by_one_gives_the_golden_tokens(
    golden: GoldenSet, reasoner: Reasoner, golden_prompts: list[EncodedSample]
) -> None:
    generator = Generator(reasoner, as_in_the_golden_set(golden, reasoner))
    assert [generator([prompt]).answers[0].tokens for prompt in golden_prompts] == expected(golden)


def test_a_padded_batch_gives_the_golden_tokens(
    golden: GoldenSet, reasoner: Reasoner, golden_prompts: list[EncodedSample]
) -> None:
    prompts = golden_prompts
    assert len({len(p.input_ids) for p in prompts}) > 1, "padding must be needed"
    answers = Generator(reasoner, as_in_the_golden_set(golden, reasoner))(prompts).answers
    assert [answer.tokens for answer in answers] == expected(golden)
    assert [answer.id for answer in answers] == [prompt.id for prompt in prompts]
    assert all(answer.hit_limit for answer in answers)


@pytest.fixture
def ragged(reasoner: Reasoner) -> Iterator[None]:
    """Let the random model open segments and end turns by itself: larger rows of the head win more often."""
    weight = reasoner.model.lm_head.weight.data
    before = weight.clone()
    generator = torch.Generator().manual_seed(1)
    for token in (reasoner.special.latent_start, reasoner.special.im_end):
        weight[token] = before.std() * 8 * torch.randn(weight.shape[1], generator=generator)
    yield
    weight.copy_(before)


@pytest.mark.usefixtures("ragged")
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_rows_do_not_depend_on_their_batch(
    golden: GoldenSet, reasoner: Reasoner, prompts: list[EncodedSample], temperature: float
) -> None:
    """Rows enter and leave segments and end at different tokens, in fp32, greedy and sampled."""
    settings = GenerationSettings(max_new_tokens=60, temperature=temperature, top_p=0.95, seed=1)
    alone = [Generator(reasoner, settings)([prompt]).answers[0] for prompt in prompts]
    together = Generator(reasoner, settings)(prompts).answers
    backwards = Generator(reasoner, settings)(prompts[::-1]).answers[::-1]
    assert together == alone and backwards == alone
    if golden.folder == DEFAULT:  # other weights may say something else
        assert len({answer.segments for answer in alone}) > 1, "segments must differ between rows"
        assert temperature or len({len(answer.tokens) for answer in alone}) > 1, "rows must end at different tokens"
    for answer in alone:
        check_grammar(answer, reasoner)


def check_grammar(answer: Answer, reasoner: Reasoner) -> None:
    """Each latent_start is followed by K pads and latent_end; neither stands anywhere else."""
    s, K = reasoner.special, reasoner.latent_size
    tokens, position, steps = answer.tokens, 0, []
    while position < len(tokens):
        assert tokens[position] not in (s.latent_pad, s.latent_end)
        if tokens[position] == s.latent_start:
            inside = tokens[position + 1 : position + 2 + K]
            whole = [s.latent_pad] * K + [s.latent_end]
            assert inside == whole[: len(inside)]
            assert len(inside) == K + 1 or answer.hit_limit
            steps.append(min(len(inside), K))
            position += len(inside)
        position += 1
    assert answer.steps == tuple(steps)
    assert answer.hit_limit == (tokens[-1] not in reasoner.stop_ids)


@pytest.mark.usefixtures("ragged")
def test_what_is_kept_is_what_a_full_recomputation_gives(reasoner: Reasoner, prompts: list[EncodedSample]) -> None:
    """One plain stock forward over prompt and answer, latents written in: every token and latent follows from it."""
    settings = GenerationSettings(max_new_tokens=40, keep_latents=True)
    for prompt in prompts[:3]:
        answer = Generator(reasoner, settings)([prompt]).answers[0]
        hidden = recompute(reasoner, prompt, answer)
        logits = reasoner.model.lm_head(hidden)
        logits[:, [reasoner.special.latent_pad, reasoner.special.latent_end]] = -torch.inf
        fed = iter(torch.cat(answer.latents)) if answer.latents else iter(())
        for position, token in enumerate(answer.tokens):
            if token == reasoner.special.latent_pad:
                torch.testing.assert_close(next(fed), hidden[position], atol=1e-5, rtol=1e-5)
            elif token != reasoner.special.latent_end:
                assert token == int(logits[position].argmax())


@torch.no_grad()
def recompute(reasoner: Reasoner, prompt: EncodedSample, answer: Answer) -> Tensor:
    """Hidden states [new tokens, D] at the positions before each new token, without a cache."""
    model, T = reasoner.model, len(prompt.input_ids)
    tokens = reasoner.collate([prompt]).micro_batches[0].tokens
    features = reasoner.tower(reasoner.collate([prompt]).images[0])
    ids = torch.tensor([*prompt.input_ids.tolist(), *answer.tokens])
    embeddings = model.get_input_embeddings()(ids)
    embeddings[tokens.image_slots] = features[tokens.image_rows]
    if answer.latents:
        embeddings[ids == reasoner.special.latent_pad] = torch.cat(answer.latents)
    positions = torch.from_numpy(prompt.position_ids)
    new = positions.max() + 1 + torch.arange(len(answer.tokens))
    positions = torch.cat([positions, new.expand(3, -1)], dim=1)[:, None]
    output = model.model.language_model(inputs_embeds=embeddings[None], position_ids=positions, use_cache=False)
    return output.last_hidden_state[0, T - 1 : -1]


@pytest.mark.usefixtures("ragged")
def test_looking_rarely_changes_nothing(
    reasoner: Reasoner, prompts: list[EncodedSample], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU: rows run on after their end until somebody looks."""
    settings = GenerationSettings(max_new_tokens=50)
    every_token = Generator(reasoner, settings)(prompts).answers
    words = [word for answer in every_token for word in [answer.text[3:6]] if word]
    settings = dataclasses.replace(settings, stop=tuple(words[:2]))
    stopped = Generator(reasoner, settings)(prompts).answers
    assert any(len(a.tokens) < len(b.tokens) for a, b in zip(stopped, every_token, strict=True))
    look = generate.AnswerReader.look
    calls: list[int] = []

    def rarely(self: Any) -> list[bool]:
        calls.append(1)
        if len(calls) % 7 and sum(len(row.tokens) for row in self.rows) + len(self._unread) < 50:
            return [False] * len(self.rows)
        return look(self)

    monkeypatch.setattr(generate.AnswerReader, "look", rarely)
    assert Generator(reasoner, settings)(prompts).answers == stopped


def test_a_stop_string_ends_an_answer_and_stays_in_it(
    golden: GoldenSet, reasoner: Reasoner, prompts: list[EncodedSample]
) -> None:
    free = Generator(reasoner, as_in_the_golden_set(golden, reasoner))([prompts[0]]).answers[0]
    word = free.text[2:5]
    answer = Generator(reasoner, as_in_the_golden_set(golden, reasoner, stop=(word,)))([prompts[0]]).answers[0]
    assert answer.text == free.text[: free.text.index(word) + len(word)]
    assert answer.tokens == free.tokens[: len(answer.tokens)]
    assert not answer.hit_limit


def test_half_a_letter_stops_nothing(reasoner: Reasoner) -> None:
    """It is shown as U+FFFD until the other half comes: whether a stop string has it must not depend on our looks."""
    halves = reasoner.encoder.tokenizer("é", add_special_tokens=False)["input_ids"]
    broken = [halves[0], *reasoner.encoder.tokenizer("a", add_special_tokens=False)["input_ids"]]
    assert len(halves) == 2
    for tokens, is_ended in ((halves, False), (broken, True)):
        at_once, one_by_one = (RowReader(reasoner, "a", ("\ufffd",), 9) for _ in range(2))
        at_once.read(tokens)
        for token in tokens:
            one_by_one.read([token])
        assert at_once.tokens == one_by_one.tokens == tokens
        assert at_once.is_ended == one_by_one.is_ended == is_ended


def test_text_is_streamed_as_it_comes(golden: GoldenSet, reasoner: Reasoner, prompts: list[EncodedSample]) -> None:
    pieces: dict[int, list[str]] = {0: [], 1: []}
    settings = as_in_the_golden_set(golden, reasoner)
    answers = Generator(reasoner, settings, on_text=lambda row, piece: pieces[row].append(piece))(prompts[:2]).answers
    assert ["".join(parts) for parts in pieces.values()] == [answer.text.rstrip("\ufffd") for answer in answers]
    assert min(map(len, pieces.values())) > 5


def test_answers_that_share_a_context_are_what_they_are_alone(
    golden: GoldenSet, reasoner: Reasoner, prompts: list[EncodedSample]
) -> None:
    """Catches an answer that reads the tokens of the one before it."""
    settings = as_in_the_golden_set(golden, reasoner, keep_latents=True)
    shared = Context(reasoner, prompts, settings.max_new_tokens)
    for source in (None, Constant(torch.zeros(reasoner.model.config.text_config.hidden_size)), Markers(), None):
        together = Generator(reasoner, settings, source)(prompts, shared).answers
        for one, other in zip(together, Generator(reasoner, settings, source)(prompts).answers, strict=True):
            assert one.tokens == other.tokens and len(one.latents) == len(other.latents)
            assert all(map(torch.equal, one.latents, other.latents))


def test_a_limit_inside_a_segment_is_reported(reasoner: Reasoner, prompts: list[EncodedSample]) -> None:
    settings = GenerationSettings(max_new_tokens=4, forced={0: reasoner.special.latent_start})
    answer = Generator(reasoner, settings)(prompts[:1]).answers[0]
    assert answer.steps == (3,) and answer.hit_limit and answer.segments == 1


def test_speeds_count_real_tokens(reasoner: Reasoner, prompts: list[EncodedSample]) -> None:
    generated = Generator(reasoner, GenerationSettings(max_new_tokens=5))(prompts)
    assert generated.speed.prefill_tokens == sum(len(prompt.input_ids) for prompt in prompts)
    assert generated.speed.decode_tokens == sum(len(answer.tokens) for answer in generated.answers)
    assert generated.speed.prefill_s > 0 and generated.speed.decode_s > 0
    assert (generated.speed + generated.speed).decode_tokens == 2 * generated.speed.decode_tokens


@torch.inference_mode()
@pytest.mark.parametrize("barred", ["image", "prompt", "image_for_words"])
def test_what_is_barred_is_as_a_mask_of_the_whole_sequence(
    reasoner: Reasoner, prompts: list[EncodedSample], barred: Barred
) -> None:
    """Catches rows that share a mask, columns shifted by padding, and a bar that begins too early or too late."""
    special = reasoner.special
    settings = GenerationSettings(16, forced={2: special.latent_start}, forbidden=reasoner.stop_ids, keep_latents=True)
    seeing = Generator(reasoner, settings)(prompts).answers
    answers = Generator(reasoner, settings, barred=barred)(prompts).answers
    assert any(a.tokens != b.tokens for a, b in zip(answers, seeing, strict=True)), "it must change something"
    for prompt, answer in zip(prompts, answers, strict=True):
        hidden = _whole_sequence(reasoner, prompt, answer, barred)
        first = len(prompt.input_ids) - 1
        K = reasoner.latent_size
        torch.testing.assert_close(hidden[first + 3 : first + 3 + K], answer.latents[0], atol=2e-4, rtol=1e-3)
        logits = reasoner.model.lm_head(hidden)
        logits[:, [special.latent_pad, special.latent_end, *reasoner.stop_ids]] = -torch.inf
        drawn = [at for at in range(len(answer.tokens)) if at != 2 and not 3 <= at <= 3 + K]
        told = [int(logits[first + at].argmax()) for at in drawn]
        assert told == [answer.tokens[at] for at in drawn]


def _whole_sequence(reasoner: Reasoner, prompt: EncodedSample, answer: Answer, barred: str) -> Tensor:
    """Hidden states [T, D] of prompt and answer in one forward, with a mask row by row."""
    context = Context(reasoner, [prompt], 0)
    tokens, special = context.tokens, reasoner.special
    embeddings = write_images(context.embed(tokens.input_ids), tokens, reasoner.tower(context.window.images[0]))
    added = context.embed(torch.tensor([answer.tokens]))
    added[0, torch.tensor(answer.tokens) == special.latent_pad] = torch.cat(answer.latents)
    embeddings = torch.cat([embeddings, added], dim=1)
    P, T = len(prompt.input_ids), embeddings.shape[1]
    positions = torch.cat([tokens.position_ids, context.position + 1 + torch.arange(T - P)], dim=2)
    mask = torch.ones(T, T, dtype=torch.bool).tril()
    columns = torch.ones(P, dtype=torch.bool) if barred == "prompt" else tokens.input_ids[0] == special.image_pad
    end = answer.tokens.index(special.latent_end)
    for at, token in enumerate(answer.tokens):
        is_word = token not in (special.latent_start, special.latent_pad)
        if at >= end and (barred != "image_for_words" or is_word):
            mask[P + at, :P] &= ~columns
    output = context.language_model(
        inputs_embeds=embeddings, position_ids=positions, attention_mask={"full_attention": mask[None, None]}
    )
    hidden: Tensor = output.last_hidden_state[0]
    return hidden
