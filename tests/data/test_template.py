"""Samples to tokens, labels, positions and answer spans, with a tokenizer of Qwen's kind."""

from __future__ import annotations

import pickle
import unicodedata
from copy import copy
from dataclasses import fields, replace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLModel

from ilvr_ds.data.decode import image_size
from ilvr_ds.data.sample import LatentStep, Sample, SampleError, TextStep, Turn
from ilvr_ds.data.template import IGNORE, REMEMBERED, EncodedSample, SampleEncoder
from tests.data.packing import image_bytes
from tests.golden_set import GoldenSet, golden_set

WIDE, TALL = image_bytes(1, size=(112, 56)), image_bytes(2, size=(56, 84))  # 4 x 2 and 2 x 3 merged patches
SYSTEM = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
LATENT = "<|latent_start|>" + 8 * "<|latent_pad|>" + "<|latent_end|>"


@pytest.fixture(scope="module")
def encoder(golden: GoldenSet) -> SampleEncoder:
    return golden.encoder


def sample_of(question: str, images: tuple[bytes, ...], *steps: str | None, answer: str = "") -> Sample:
    """Steps are texts; None is a latent step."""
    helpers = steps.count(None)
    numbers = iter(range(helpers))
    plan = tuple(LatentStep(next(numbers)) if step is None else TextStep(step) for step in steps)
    return Sample("s", question, plan, images, (TALL,) * helpers, answer)


def image(merged_patches: int) -> str:
    return "<|vision_start|>" + merged_patches * "<|image_pad|>" + "<|vision_end|>"


PLAIN = sample_of("Look here", (WIDE,), "first\n", None, "then ", None, "so\n", "Final: C", answer="C")


def test_regions_become_fractions_of_their_helper_image(encoder: SampleEncoder) -> None:
    """Whatever the picture is scaled to."""
    width, height = image_size(TALL)
    steps = (LatentStep(0), TextStep("a"), LatentStep(1, (0, height / 4, width / 2, height)), TextStep("Final: C"))
    sample = Sample("s", "Look here", steps, (WIDE,), (TALL, TALL), "C")
    assert encoder(sample).regions == (None, (0, 0.25, 0.5, 1))


def test_golden_tokens_labels_and_grids() -> None:
    """The authors' own numbers; the forward passes are compared in tests/distributed."""
    golden = golden_set()
    assert golden.encoder.special.latent_pad == golden.settings["special_ids"]["<|latent_pad|>"]
    for sample, encoded in zip(golden.samples, golden.encoded, strict=True):
        real = golden.expected[f"{sample.id}.attention_mask"].bool()
        wanted = {key: golden.expected[f"{sample.id}.{key}"][real].tolist() for key in ("input_ids", "labels")}
        assert encoded.input_ids.tolist() == wanted["input_ids"]
        assert encoded.labels.tolist() == wanted["labels"]
        grids = [
            row
            for key in ("image_grid_thw", "image_grid_thw_latent")
            if (stored := golden.expected.get(f"{sample.id}.{key}")) is not None
            for row in stored.view(-1, 3).tolist()
        ]
        assert [[1, *grid] for grid in encoded.grids] == grids


def test_the_text_is_the_chat_template_with_latents_between_the_steps(encoder: SampleEncoder) -> None:
    text = encoder.tokenizer.decode(encoder(PLAIN).input_ids)
    assert text == (
        f"{SYSTEM}<|im_start|>user\n{image(8)}Look here<|im_end|>\n"
        f"<|im_start|>assistant\nfirst\n{LATENT}then {LATENT}so\nFinal: C<|im_end|>\n"
    )


def test_labels_are_all_of_the_assistants_turn_but_its_opening_and_the_pads(encoder: SampleEncoder) -> None:
    encoded = encoder(PLAIN)
    assert ((encoded.labels == IGNORE) | (encoded.labels == encoded.input_ids)).all()
    shown = encoder.tokenizer.decode(encoded.input_ids[encoded.labels != IGNORE])
    bare = "<|latent_start|><|latent_end|>"
    assert shown == f"\nfirst\n{bare}then {bare}so\nFinal: C<|im_end|>\n"
    opening = encoded.input_ids[encoded.assistant : encoded.assistant + 3]
    assert encoder.tokenizer.decode(opening[:1]) == "<|im_start|>"
    assert encoder.tokenizer.decode(encoded.input_ids[: encoded.assistant]).endswith("Look here<|im_end|>\n")


def test_segments_are_the_first_pads(encoder: SampleEncoder) -> None:
    encoded, pad = encoder(PLAIN), encoder.special.latent_pad
    assert len(encoded.segments) == 2
    for first in encoded.segments:
        assert (encoded.input_ids[first : first + 8] == pad).all()
        assert encoded.input_ids[first - 1] == encoder.special.latent_start
        assert encoded.input_ids[first + 8] == encoder.special.latent_end
    assert (encoded.input_ids == pad).sum() == 16


@pytest.mark.parametrize(
    ("question", "wanted"),
    [
        ("Compare.", f"{image(8)}{image(6)}Compare."),
        ("Is <image> like <image>?", f"Is {image(8)} like {image(6)}?"),
        ("<image><image>", f"{image(8)}{image(6)}"),
    ],
)
def test_images_stand_at_the_markers_or_first(question: str, wanted: str, encoder: SampleEncoder) -> None:
    text = encoder.tokenizer.decode(encoder(sample_of(question, (WIDE, TALL), "A")).input_ids)
    assert text.startswith(f"{SYSTEM}<|im_start|>user\n{wanted}<|im_end|>\n")


@pytest.mark.parametrize(("question", "images"), [("<image> and <image>", (WIDE,)), ("<image>", ())])
def test_markers_without_an_image_are_refused(question: str, images: tuple[bytes, ...], encoder: SampleEncoder) -> None:
    with pytest.raises(SampleError, match="image slots"):
        encoder(sample_of(question, images, "A"))


@pytest.mark.parametrize(
    "token",
    [
        *("<|latent_pad|>", "<|latent_start|>", "<|latent_end|>", "<|im_start|>", "<|im_end|>", "<|endoftext|>"),
        *("<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>"),
    ],
)
@pytest.mark.parametrize("where", ["question", "step"])
def test_reserved_tokens_in_the_text_are_refused(token: str, where: str, encoder: SampleEncoder) -> None:
    """Otherwise a question could open a segment, an image or another turn."""
    question, step = (f"a {token} b", "A") if where == "question" else ("a", f"A {token}")
    with pytest.raises(SampleError) as caught:
        encoder(sample_of(question, (), step))
    assert f"reserved token {token}" in str(caught.value)


def test_reserved_tokens_of_two_steps_are_refused(encoder: SampleEncoder) -> None:
    """Catches a turn that ends where two texts meet."""
    with pytest.raises(SampleError, match=r"reserved token <\|im_end\|>"):
        encoder(sample_of("a", (), "A <|im_", "end|> B"))


def test_a_helper_image_that_is_too_narrow_is_found_when_packing(encoder: SampleEncoder) -> None:
    """Catches a sample that `pack` takes and training cannot use: boxes make narrow pictures."""
    narrow = replace(PLAIN, helper_images=(TALL, image_bytes(3, size=(1, 300))))
    for measure in (encoder, encoder.count_tokens):
        with pytest.raises(
            SampleError, match=r"^helper image 2: image of 1x300 pixels: .*aspect ratio.*; crop or pad it"
        ):
            measure(narrow)
    with pytest.raises(SampleError, match=r"^input image 1: image of 1x300 pixels: "):
        encoder.count_tokens(replace(PLAIN, input_images=narrow.helper_images[1:]))


def test_one_token_too_many_is_refused(golden: GoldenSet) -> None:
    whole = golden.encoder
    length = len(whole(PLAIN).input_ids)
    assert whole.count_tokens(PLAIN) == length

    def limited(limit: int) -> SampleEncoder:
        return SampleEncoder(whole.tokenizer, whole.special, whole.images, whole.latent_size, max_tokens=limit)

    assert len(limited(length)(PLAIN).input_ids) == length
    with pytest.raises(SampleError, match=f"{length} tokens, data.max_tokens allows {length - 1}"):
        limited(length - 1)(PLAIN)


@pytest.mark.parametrize(
    ("steps", "answer", "shown"),
    [
        (("It is C. ", None, "Final answer: C"), "C", " C"),
        (("C or C",), "C", " C"),
        (("70°",), "70°", "70°"),
        (("down left", None), "left", " left"),
        (("x ", None, "d"), "d", "d"),
        (("i",), "i", "i"),
    ],
    ids=["last step", "last occurrence", "bytes", "segment behind it", "letter of im_end", "letter of assistant"],
)
def test_the_answer_is_its_last_occurrence_in_the_last_text(
    steps: tuple[str | None, ...], answer: str, shown: str, encoder: SampleEncoder
) -> None:
    encoded = encoder(sample_of("Question", (WIDE,), *steps, answer=answer))
    first, last = encoded.answer
    assert encoder.tokenizer.decode(encoded.input_ids[first:last]) == shown
    assert (encoded.labels[first:last] != IGNORE).all()
    behind = encoder.tokenizer.decode([i for i in encoded.input_ids[last:] if i < encoder.special.latent_pad])
    assert behind.replace(" ", "") == "<|im_end|>\n"


def test_the_answer_is_not_marked_inside_a_later_word(encoder: SampleEncoder) -> None:
    """Else eval/answer_accuracy counts a token that has nothing to do with the answer."""
    encoded = encoder(sample_of("Question", (WIDE,), "The final answer is: A. All others are wrong", answer="A"))
    first, last = encoded.answer
    assert encoder.tokenizer.decode(encoded.input_ids[first:last]).strip() == "A"
    assert encoder.tokenizer.decode(encoded.input_ids[last:]).startswith(". All")


def test_an_answer_whose_accent_is_written_in_another_way_is_marked_whole(encoder: SampleEncoder) -> None:
    whole, apart = "caf\u00e9", "cafe\u0301"
    for text, answer in ((whole, apart), (apart, whole)):
        encoded = encoder(sample_of("Question", (), f"The final answer is: {text}.", answer=answer))
        first, last = encoded.answer
        shown = encoder.tokenizer.decode(encoded.input_ids[first:last])
        assert unicodedata.normalize("NFC", shown.strip()) == whole
        assert encoder.tokenizer.decode(encoded.input_ids[last:]).startswith(".")


@pytest.mark.parametrize("answer", ["", "B"])
def test_an_answer_that_is_not_in_the_last_text_has_no_span(answer: str, encoder: SampleEncoder) -> None:
    encoded = encoder(replace(sample_of("Question", (), "B or C. ", "Final: C"), answer=answer))
    assert encoded.answer[0] == encoded.answer[1]


@pytest.fixture(scope="module")
def stock(golden: GoldenSet) -> Any:
    """The stock model without weights."""
    with torch.device("meta"):
        return Qwen2_5_VLModel(AutoConfig.from_pretrained(golden.folder))


@pytest.mark.parametrize("images", [(), (WIDE,), (TALL, WIDE), (WIDE, WIDE, TALL)])
@pytest.mark.parametrize("marked", [False, True])
def test_positions_are_the_stock_models(
    images: tuple[bytes, ...], marked: bool, stock: Any, encoder: SampleEncoder
) -> None:
    """mRoPE of the input images only: helper images have none, a latent token is one text position."""
    question = "<image> or ".join(["", *([""] * len(images))]) + "what?" if marked else "what?"
    encoded = encoder(sample_of(question, images, "first ", None, "A"))
    ids = torch.tensor(encoded.input_ids)[None]
    is_image = ids == encoder.special.image_pad
    grids = torch.tensor([(1, *grid) for grid in encoded.grids[: len(images)]])
    wanted, _ = stock.get_rope_index(
        ids, mm_token_type_ids=is_image.int(), image_grid_thw=grids if len(images) else None
    )
    assert encoded.position_ids.tolist() == wanted[:, 0].tolist()
    (segment,) = encoded.segments
    steps = np.diff(encoded.position_ids[:, segment - 1 : segment + 9], axis=1)
    assert (steps == 1).all()


def same(a: EncodedSample, b: EncodedSample) -> bool:
    pairs = [(getattr(a, field.name), getattr(b, field.name)) for field in fields(a) if field.name != "patches"]
    is_same = all(np.array_equal(x, y) if isinstance(x, np.ndarray) else x == y for x, y in pairs)
    return is_same and all(map(np.array_equal, a.patches, b.patches))


def test_remembered_tokens_are_those_of_a_new_encoder(encoder: SampleEncoder) -> None:
    """Samples that differ in one thing each, all twice; a pickled encoder remembers nothing."""
    steps = (TextStep("first\n"), LatentStep(0, (0, 0, 10, 10)), TextStep("then "), LatentStep(1), TextStep("Final: C"))
    base = Sample("a", "Look here", steps, (WIDE,), (TALL, TALL), "C", "group")
    samples = [
        base,
        replace(base, id="b", group="other", meta={"key": "value"}),
        replace(base, steps=(steps[0], LatentStep(0, (0, 0, 5, 5)), *steps[2:])),
        replace(base, helper_images=(WIDE, TALL)),
        replace(base, input_images=(TALL,)),
        replace(base, input_images=(WIDE, TALL)),
        replace(base, answer="F"),
        replace(base, question="Look there"),
        replace(base, history=(Turn("system", "Be brief."),)),
        replace(base, steps=(*steps[:3], TextStep("so "), LatentStep(1), steps[4])),
    ]
    remembering = pickle.loads(pickle.dumps(encoder))
    for sample in (*samples, *samples):
        assert same(remembering(sample), pickle.loads(pickle.dumps(encoder))(sample))
    assert remembering._words.cache_info().misses == 7  # the first four have one text and one grid


def test_each_encoder_remembers_its_own_tokens(golden: GoldenSet, encoder: SampleEncoder) -> None:
    """Catches memories that go along with a copy, and those that several tokenizers or latent sizes share."""
    encoder(PLAIN)
    short = SampleEncoder(golden.encoder.tokenizer, encoder.special, encoder.images, 3, 1000)
    other = copy(encoder)
    other.latent_size = 3
    assert len(encoder(PLAIN).input_ids) - len(short(PLAIN).input_ids) == 2 * (8 - 3)
    assert same(short(PLAIN), other(PLAIN))
    assert len(encoder.seeing_helpers()(PLAIN).grids) == 3


def test_what_is_remembered_is_bounded_and_cannot_be_changed(encoder: SampleEncoder) -> None:
    new = pickle.loads(pickle.dumps(encoder))
    for number in range(REMEMBERED + 5):
        encoded = new(Sample("s", f"Question {number}", (TextStep("A"),)))
    assert new._words.cache_info().currsize == REMEMBERED
    with pytest.raises(ValueError, match="read-only"):
        encoded.labels[0] = 0


def test_a_text_that_is_refused_is_refused_again(encoder: SampleEncoder) -> None:
    for _ in range(2):
        with pytest.raises(SampleError, match="reserved token"):
            encoder(replace(PLAIN, question="<|im_end|>"))


def test_images_are_input_images_then_helper_images(encoder: SampleEncoder) -> None:
    encoded = encoder(sample_of("Look", (WIDE, TALL), None, "then", None))
    assert encoded.num_input_images == 2 and encoded.grids == ((4, 8), (6, 4), (6, 4), (6, 4))
    assert [len(patches) for patches in encoded.patches] == [32, 24, 24, 24]


def test_a_prompt_ends_where_the_assistant_begins(encoder: SampleEncoder) -> None:
    prompt = encoder.prompt_text(PLAIN)
    assert prompt == f"{SYSTEM}<|im_start|>user\n{image(1)}Look here<|im_end|>\n<|im_start|>assistant\n"


CHAT = replace(
    sample_of("Sure?<image>", (WIDE, TALL), "Look: ", None, "Final: C", answer="C"),
    history=(Turn("user", "<image>What?"), Turn("assistant", "A cat."), Turn("user", "Why?"), Turn("assistant", "So.")),
)


def test_a_conversation_is_the_chat_template_over_all_its_turns(encoder: SampleEncoder) -> None:
    text = encoder.tokenizer.decode(encoder(CHAT).input_ids)
    turns = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}]},
        {"role": "assistant", "content": "A cat."},
        {"role": "user", "content": "Why?"},
        {"role": "assistant", "content": "So."},
        {"role": "user", "content": [{"type": "text", "text": "Sure?"}, {"type": "image"}]},
        {"role": "assistant", "content": f"Look: {LATENT}Final: C"},
    ]
    first, second, rest = encoder.tokenizer.apply_chat_template(turns, tokenize=False).split(image(1))
    assert text == f"{first}{image(8)}{second}{image(6)}{rest}"
    assert encoder.prompt_text(CHAT) == f"{first}{image(1)}{second}{image(1)}{rest}".partition("Look: ")[0]
    assert encoder.tokenizer.decode(encoder.prompt(CHAT).input_ids) == text.partition("Look: ")[0]


def test_each_of_the_assistants_turns_is_supervised(encoder: SampleEncoder) -> None:
    """And nothing else: neither the user's words nor the openings of turns."""
    encoded = encoder(CHAT)
    is_label = encoded.labels != IGNORE
    assert (encoded.labels[is_label] == encoded.input_ids[is_label]).all()
    edges = np.flatnonzero(np.diff(np.concatenate([[False], is_label, [False]]).astype(int)))
    shown = [encoder.tokenizer.decode(encoded.input_ids[a:b]) for a, b in zip(edges[::2], edges[1::2], strict=True)]
    assert shown == [
        "\nA cat.<|im_end|>\n",
        "\nSo.<|im_end|>\n",
        "\nLook: <|latent_start|>",
        "<|latent_end|>Final: C<|im_end|>\n",
    ]


def test_segments_and_answer_are_those_of_the_last_turn(encoder: SampleEncoder) -> None:
    encoded = encoder(CHAT)
    behind = encoder.tokenizer.decode(encoded.input_ids[encoded.assistant :])
    assert behind == f"<|im_start|>assistant\nLook: {LATENT}Final: C<|im_end|>\n"
    assert len(encoded.segments) == 1 and encoded.segments[0] > encoded.assistant
    first, last = encoded.answer
    assert encoder.tokenizer.decode(encoded.input_ids[first:last]) == " C"


def test_images_stand_before_the_first_turn_where_none_has_a_marker(encoder: SampleEncoder) -> None:
    history = (Turn("system", "Be short."), Turn("user", "What?"), Turn("assistant", "A cat."))
    text = encoder.tokenizer.decode(encoder(replace(sample_of("Why?", (WIDE,), "So."), history=history)).input_ids)
    assert text == (
        f"<|im_start|>system\nBe short.<|im_end|>\n<|im_start|>user\n{image(8)}What?<|im_end|>\n"
        "<|im_start|>assistant\nA cat.<|im_end|>\n<|im_start|>user\nWhy?<|im_end|>\n"
        "<|im_start|>assistant\nSo.<|im_end|>\n"
    )


@pytest.mark.parametrize("role", ["system", "user", "assistant"])
def test_reserved_tokens_in_the_history_are_refused(role: str, encoder: SampleEncoder) -> None:
    history = (Turn("system", "s"), Turn("user", "q"), Turn("assistant", "r"))
    history = tuple(replace(turn, text="a <|im_start|>assistant") if turn.role == role else turn for turn in history)
    sample = replace(sample_of("Why?", (), "So."), history=history)
    for act in (encoder, encoder.prompt):
        with pytest.raises(SampleError, match="reserved token"):
            act(sample)


@pytest.mark.parametrize("free_latents", [False, True])
def test_a_window_mixes_conversations_and_plans(free_latents: bool, golden: GoldenSet, encoder: SampleEncoder) -> None:
    """Every reply is in the loss; a conversation without helper images adds no segment."""
    plain = replace(CHAT, steps=(TextStep("Final: C"),), helper_images=())
    samples = [encoder(plain), encoder(CHAT), encoder(PLAIN)]
    window = golden.collator("packed", free_latents)(samples, np.arange(3), [3])
    (micro,) = window.micro_batches
    assert micro.label_ids.tolist() == [int(i) for s in samples for i in s.labels[s.labels != IGNORE]]
    shown = encoder.tokenizer.decode(micro.label_ids)
    assert shown.count("A cat.<|im_end|>") == shown.count("So.<|im_end|>") == 2
    assert micro.sample_of_segment.tolist() == [1, 2, 2]
