"""Windows of handmade samples: every index is followed to what it should point at."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from ilvr_ds.data.collate import Collator
from ilvr_ds.data.template import IGNORE, EncodedSample
from ilvr_ds.data.window import Round, TokenBatch, Window
from tests.data.handmade import (
    ASSISTANT,
    FILL,
    IMAGE,
    LAYOUT,
    OPEN,
    PAD,
    SPECIAL,
    START,
    K,
    encoded_sample,
    feature_names,
    flat,
    leaves,
    window_of,
)

SMALL, MEDIUM, LARGE = (2, 6), (4, 4), (4, 10)  # 3, 4 and 10 merged patches
SAMPLES = [
    encoded_sample(0, inputs=(MEDIUM,), helpers=(SMALL, LARGE), question=3),
    encoded_sample(1, question=9),
    encoded_sample(2, inputs=(SMALL, LARGE), helpers=(LARGE, MEDIUM, SMALL)),
    encoded_sample(3, helpers=(SMALL,), question=2, answer=False),
]
ORDER = [(0, 0), (2, 0), (3, 0), (0, 1), (2, 1), (2, 2)]
"""(sample, segment) round by round."""

both_sides = pytest.mark.parametrize("side", ["right", "left"])
all_rows = pytest.mark.parametrize("rows", ["packed", "right", "left"])
every_cut = pytest.mark.parametrize("micro", [1, 2, 4])


def members(micro: int) -> list[list[EncodedSample]]:
    return [SAMPLES[i : i + micro] for i in range(0, len(SAMPLES), micro)]


def sequences(window: Window, micro: int) -> list[tuple[TokenBatch, list[EncodedSample]]]:
    """The window's own sequences and those of its micro-batches, with the samples in them."""
    batches = [batch.tokens for batch in window.micro_batches]
    return [(window.tokens, SAMPLES), *zip(batches, members(micro), strict=True)]


@both_sides
@every_cut
def test_tokens_are_padded_on_the_side_that_is_asked_for(side: str, micro: int) -> None:
    window = window_of(SAMPLES, micro, side)
    for batch, samples in sequences(window, micro):
        longest = max(len(s.input_ids) for s in samples)
        assert batch.input_ids.shape == (len(samples), longest)
        for b, s in enumerate(samples):
            first = 0 if side == "right" else longest - len(s.input_ids)
            real = [first <= t < first + len(s.input_ids) for t in range(longest)]
            assert batch.real[b].tolist() == real
            assert batch.input_ids[b, real].tolist() == s.input_ids.tolist()
            assert batch.position_ids[:, b, real].tolist() == s.position_ids.tolist()
            padding = ~batch.real[b]
            assert (batch.input_ids[b, padding] == FILL).all() and (batch.position_ids[:, b, padding] == 0).all()


@every_cut
def test_packed_samples_lie_end_to_end(micro: int) -> None:
    for batch, samples in sequences(window_of(SAMPLES, micro, "packed"), micro):
        assert batch.input_ids.tolist() == [[token for s in samples for token in s.input_ids]]
        assert batch.position_ids.tolist() == [[[p for s in samples for p in s.position_ids[a]]] for a in range(3)]
        assert bool(batch.real.all()) and batch.right_padded
        assert batch.lengths == tuple(len(s.input_ids) for s in samples)
        assert batch.cu_seqlens is not None and batch.cu_seqlens.dtype == torch.int32
        assert batch.cu_seqlens.tolist() == [sum(batch.lengths[:b]) for b in range(len(samples) + 1)]
    assert window_of(SAMPLES, micro, "packed").num_padding == 0 < window_of(SAMPLES, 4).num_padding


def test_micro_batches_are_as_large_as_they_are_asked_to_be() -> None:
    window = Collator(SPECIAL, LAYOUT, K, 4, "packed")(SAMPLES, 50 + np.arange(len(SAMPLES)), [1, 3])
    assert [micro.ids for micro in window.micro_batches] == [("id-0",), ("id-1", "id-2", "id-3")]
    assert window.micro_batches[1].segments.tolist() == [1, 2, 4, 5]


@pytest.mark.parametrize(("side", "micro", "masked"), [("right", 4, False), ("left", 4, True), ("left", 1, False)])
def test_a_mask_is_needed_only_where_padding_stands_in_front(side: str, micro: int, masked: bool) -> None:
    assert all(m.tokens.right_padded != masked for m in window_of(SAMPLES, micro, side).micro_batches)


@all_rows
@every_cut
def test_every_image_token_gets_its_own_patch(rows: str, micro: int) -> None:
    window = window_of(SAMPLES, micro, rows)
    names = feature_names(window.images)
    for batch, samples in sequences(window, micro):
        assert batch.image_slots.tolist() == (batch.input_ids.flatten() == IMAGE).nonzero()[:, 0].tolist()
        wanted = [
            (10 * int(s.id[-1]) + j, patch)
            for s in samples
            for j in range(s.num_input_images)
            for patch in range(s.grids[j][0] * s.grids[j][1] // 4)
        ]
        assert [names[row] for row in batch.image_rows] == wanted


@every_cut
def test_the_tower_sees_every_image_once_with_inputs_before_helpers(micro: int) -> None:
    window = window_of(SAMPLES, micro)
    seen = [list(dict.fromkeys(name for name, _ in feature_names((batch,)))) for batch in window.images]
    for images, samples in zip(seen, members(micro), strict=True):
        numbers = [(10 * int(s.id[-1]), s.num_input_images, len(s.grids)) for s in samples]
        inputs = [first + j for first, count, _ in numbers for j in range(count)]
        helpers = [first + j for first, count, total in numbers for j in range(count, total)]
        assert images == (inputs + helpers or [128]), "a micro-batch without images shows one grey one"


@all_rows
@every_cut
def test_hidden_states_before_the_supervised_tokens_predict_them(rows: str, micro: int) -> None:
    window = window_of(SAMPLES, micro, rows)
    for batch, samples in zip(window.micro_batches, members(micro), strict=True):
        wanted = [int(token) for s in samples for token in s.labels if token != IGNORE]
        assert batch.label_ids.tolist() == wanted
        assert flat(batch.tokens.input_ids, batch.label_rows + 1) == wanted
    assert window.supervised.tolist() == [sum((s.labels != IGNORE).sum() for s in SAMPLES)]


@all_rows
@every_cut
def test_answers_are_rows_of_the_labels(rows: str, micro: int) -> None:
    window = window_of(SAMPLES, micro, rows)
    for batch, samples in zip(window.micro_batches, members(micro), strict=True):
        spans = [s.input_ids[s.answer[0] : s.answer[1]].tolist() for s in samples]
        assert batch.label_ids[batch.answer_rows].tolist() == [token for span in spans for token in span]
        assert batch.answer_samples.tolist() == [b for b, span in enumerate(spans) for _ in span]
        assert batch.has_answer.tolist() == [bool(span) for span in spans]
        assert (batch.ids, batch.groups) == (tuple(s.id for s in samples), tuple(s.group for s in samples))


@all_rows
@every_cut
def test_latent_slots_are_the_pads_of_each_segment(rows: str, micro: int) -> None:
    for batch in window_of(SAMPLES, micro, rows).micro_batches:
        assert batch.latent_slots.shape == (len(batch.segments), K)
        assert flat(batch.tokens.input_ids, batch.latent_slots) == [PAD] * K * len(batch.segments)
        assert flat(batch.tokens.input_ids, batch.latent_slots[:, :1] - 1) == [START] * len(batch.segments)
        cu_seqlens, width = batch.tokens.cu_seqlens, batch.tokens.input_ids.shape[1]
        starts = torch.arange(1, micro) * width if cu_seqlens is None else cu_seqlens[1:-1]
        owners = torch.bucketize(batch.latent_slots, starts, right=True)
        assert (owners == batch.sample_of_segment[:, None]).all()


@every_cut
def test_segments_stand_round_by_round(micro: int) -> None:
    window = window_of(SAMPLES, micro)
    context = window.context
    assert context.sample.tolist() == [i for i, _ in ORDER]
    assert context.previous.tolist() == [0, 1, 2, 0, 1, 4]
    assert context.has_previous.tolist() == [False, False, False, True, True, True]
    assert window.candidates.offsets.tolist() == [0, 3, 7, 10, 14, 18, 21]
    assert context.rounds == (Round(0, 3, 0, 10), Round(3, 5, 10, 18), Round(5, 6, 18, 21))


@pytest.mark.parametrize(
    ("grid", "runs"),
    [
        (SMALL, [[0], [1], [2]]),
        (MEDIUM, [[0], [1], [2], [3]]),
        ((2, 14), [[0], [1], [2], [3]]),
        ((4, 8), [[0, 1], [2, 3], [4, 5], [6, 7]]),
        (LARGE, [[0, 1], [2, 3], [4, 5], [6, 7]]),
    ],
    ids=["3 of 4", "4 of 4", "7 of 4 (3 dropped)", "8 of 4", "10 of 4 (2 dropped)"],
)
def test_candidates_are_means_of_equal_runs(grid: tuple[int, int], runs: list[list[int]]) -> None:
    window = window_of([encoded_sample(0, inputs=(SMALL,), helpers=(grid,))], 1, group_size=4)
    names = feature_names(window.images)
    assert [[names[row] for row in run] for run in window.candidates.rows] == [[(1, p) for p in run] for run in runs]
    assert window.candidates.weights.tolist() == [[1 / len(run)] * len(run) for run in runs]


def test_shorter_runs_are_padded_with_weight_zero() -> None:
    window = window_of(SAMPLES, 2)
    names, offsets = feature_names(window.images), window.candidates.offsets.tolist()
    for (i, m), first, last in zip(ORDER, offsets[:-1], offsets[1:], strict=True):
        sample = SAMPLES[i]
        image = sample.num_input_images + m
        run = 2 if sample.grids[image] == LARGE else 1
        for n in range(first, last):
            weights = window.candidates.weights[n].tolist()
            assert weights == [1 / run] * run + [0] * (2 - run)
            wanted = [(10 * i + image, (n - first) * run + r) for r in range(run)]
            assert [names[row] for row in window.candidates.rows[n, :run]] == wanted


@every_cut
def test_a_micro_batch_finds_its_segments_and_candidates_in_the_window(micro: int) -> None:
    window = window_of(SAMPLES, micro)
    offsets = window.candidates.offsets
    for start, batch in zip(range(0, len(SAMPLES), micro), window.micro_batches, strict=True):
        mine = [w for w, (i, _) in enumerate(ORDER) if i in range(start, start + micro)]
        assert batch.segments.tolist() == mine
        assert batch.sample_of_segment.tolist() == [ORDER[w][0] - start for w in mine]
        assert batch.noise_keys.tolist() == [[50 + ORDER[w][0], ORDER[w][1]] for w in mine]
        bounds = batch.candidate_offsets.tolist()
        for w, first, last in zip(mine, bounds[:-1], bounds[1:], strict=True):
            assert batch.candidate_rows[first:last].tolist() == list(range(offsets[w], offsets[w + 1]))


@all_rows
def test_the_teachers_context_is_prompt_images_and_the_text_before_each_segment(rows: str) -> None:
    window = window_of(SAMPLES, 2, rows)
    context, ids = window.context, window.tokens.input_ids

    def tokens(positions: torch.Tensor, mask: torch.Tensor) -> list[int]:
        return flat(ids, positions[mask])

    for b, s in enumerate(SAMPLES):
        before = s.input_ids[: s.assistant].tolist()
        assert tokens(context.prompt[b], context.prompt_mask[b]) == [i for i in before if i > 1000 or i in (4, 5)]
        assert tokens(context.image[b], context.image_mask[b]) == [IMAGE] * before.count(IMAGE)
    for w, (i, m) in enumerate(ORDER):
        s = SAMPLES[i]
        text = [int(t) for t in s.input_ids[: s.segments[m] - 1] if t > 1000][-(m + 1) :]
        assert tokens(context.step[w], context.step_mask[w]) == ([OPEN, ASSISTANT, *text] if m == 0 else text)


def test_text_alone_takes_the_same_path() -> None:
    """No image, no segment: empty indices of the right shape, and one grey image that nothing refers to."""
    window = window_of([encoded_sample(0), encoded_sample(1)], 1)
    (batch, _), (image, _) = window.micro_batches, window.images
    assert (image.patches == 128).all() and image.cu_seqlens.tolist() == [0, 4]
    assert window.tokens.image_slots.numel() == window.tokens.image_rows.numel() == 0
    assert window.candidates.rows.shape == window.candidates.weights.shape == (0, 1)
    assert window.candidates.offsets.tolist() == batch.candidate_offsets.tolist() == [0]
    assert batch.latent_slots.shape == (0, K) and batch.noise_keys.shape == (0, 2)
    assert window.context.rounds == () and not window.context.image_mask.any()


def test_tokens_and_padding_are_counted() -> None:
    window = window_of(SAMPLES, 2)
    lengths = [len(s.input_ids) for s in SAMPLES]
    assert window.num_tokens == sum(lengths)
    assert window.num_padding == abs(lengths[0] - lengths[1]) + abs(lengths[2] - lengths[3])


@pytest.mark.parametrize("samples", [SAMPLES, [encoded_sample(0), encoded_sample(1)]], ids=["mixed", "text alone"])
def test_indices_are_int64(samples: list[EncodedSample]) -> None:
    """An empty float tensor among them would fail on the one micro-batch that has none."""
    other = {"patches": torch.uint8, "cu_seqlens": torch.int32, "cu_window_seqlens": torch.int32}
    other |= {"weights": torch.float32, "real": torch.bool, "has_answer": torch.bool, "has_previous": torch.bool}
    other |= {f"{name}_mask": torch.bool for name in ("prompt", "image", "step")}
    for name, tensor in leaves(window_of(samples, 1)):
        assert tensor.dtype == other.get(name, torch.int64), name


def test_a_window_moves_to_a_device_but_for_the_lengths_of_the_sequences() -> None:
    moved: Window = window_of(SAMPLES, 2).to(torch.device("meta"))
    on_host = {name for name, tensor in leaves(moved) if not tensor.is_meta}
    assert on_host == {"cu_seqlens", "cu_window_seqlens"}
    assert moved.micro_batches[1].ids == ("id-2", "id-3")
