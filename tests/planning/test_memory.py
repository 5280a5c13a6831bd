from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

from ilvr_ds import shipped
from ilvr_ds.config import ModelConfig, load_recipe
from ilvr_ds.distill.ema import PIECE, STREAMS
from ilvr_ds.engine.even_slices import GROUP
from ilvr_ds.engine.settings import read_deepspeed_json
from ilvr_ds.planning.geometry import KNOWN
from ilvr_ds.planning.memory import GIB, Memory, activation_bytes, predict_memory
from ilvr_ds.planning.setup import SampleSize, Setup, Zero
from tests.ranks import ROOT

LORA = {"lora_rank": 64, "lora_targets": ModelConfig.lora_targets}
OFFLOADED = {"optimizer": "cpu_adam"}
CHAIN: dict[str, Any] = {"has_teacher": False, "latent_gradient": "full"}
"""The published stage 2"""


def setup_of(zero_file: str, name: str = "3b", world: int = 1, samples: int = 4) -> Setup:
    return Setup(
        geometry=KNOWN[name],
        world=world,
        zero=Zero.of(json.loads((ROOT / "ds_configs" / zero_file).read_text())),
        sample=SampleSize(tokens=999),
        micro_batch_size=samples,
        grad_accum_steps=2,
        itemsize=2,
        has_fused_layers=True,
        average_itemsize=2,
        checkpointing="none",
        logits_chunk=2**20,
        optimizer="adamw",
        lora_rank=0,
        lora_targets=(),
        has_teacher=True,
        teacher_offload="cpu",
        has_tower=True,
        num_workers=2,
    )


def states(memory: Memory) -> float:
    names = ("student's weights", "gradients", "float32 weights", "moments of the optimizer")
    return sum(memory.resident.get(name, 0.0) for name in names)


@pytest.mark.parametrize(
    ("model", "micro_batch", "window", "fused", "checkpointing", "optimizer", "measured"),
    [
        ("3b", 4, 8, False, "none", "adamw", 66.9),
        ("3b", 8, 16, False, "none", "adamw", 85.1),
        ("3b", 8, 32, True, "none", "adamw", 75.0),
        ("7b", 6, 16, False, "selective", "adamw", 134.4),
        ("7b", 8, 32, True, "selective", "adamw_8bit", 99.9),
        ("7b", 8, 32, True, "none", "adamw_8bit", 109.3),
    ],
)
def test_the_measured_points(
    model: str, micro_batch: int, window: int, fused: bool, checkpointing: str, optimizer: str, measured: float
) -> None:
    """docs/performance.md: peaks of torch in GiB on one H200 under ZeRO-3, samples of 999 tokens."""
    setup = replace(
        setup_of("zero3_single_gpu.json", model, samples=micro_batch),
        grad_accum_steps=-(-window // micro_batch),
        has_fused_layers=fused,
        checkpointing=checkpointing,
        optimizer=optimizer,
        logits_chunk=1024,
    )
    assert predict_memory(setup).peak / GIB == pytest.approx(measured, rel=0.02)


@pytest.mark.parametrize(
    ("zero", "model", "world", "micro_batch", "window", "changes", "measured"),
    [
        ("zero3.json", "7b", 2, 6, 36, {"optimizer": "adamw_8bit"}, 66.9),
        ("zero3.json", "3b", 2, 6, 36, {}, 47.3),
        ("zero3.json", "3b", 2, 6, 36, {"teacher_offload": "none"}, 53.1),
        ("zero2.json", "3b", 2, 6, 36, {}, 49.3),
        ("zero1.json", "3b", 2, 6, 36, {}, 52.1),
        ("zero1.json", "3b", 1, 6, 36, {}, 72.1),
        ("zero3_single_gpu.json", "3b", 1, 6, 36, {}, 68.4),
        ("zero3_single_gpu.json", "3b", 1, 6, 36, LORA, 29.5),
        ("zero3_single_gpu.json", "7b", 1, 8, 32, {"optimizer": "adamw_8bit", "has_tower": False}, 107.9),
        ("zero3_single_gpu.json", "7b", 1, 12, 36, {"optimizer": "adamw_8bit", "has_tower": False}, 124.6),
        ("zero2.json", "3b", 2, 8, 8, {**CHAIN, "checkpointing": "full"}, 41.8),
        ("zero3_kept_weights.json", "3b", 2, 8, 8, {**CHAIN, "checkpointing": "full"}, 38.5),
        ("zero3.json", "3b", 2, 12, 36, {}, 66.1),
        ("zero3.json", "7b", 2, 4, 36, {"optimizer": "adamw_8bit"}, 58.2),
        ("zero3_single_gpu.json", "3b", 1, 6, 36, {"checkpointing": "full"}, 53.5),
        ("zero1.json", "3b", 1, 6, 36, LORA, 29.8),
        ("zero1.json", "3b", 1, 6, 36, {**LORA, "has_4_bit_base": True}, 25.9),
        ("zero3_offload_optimizer.json", "3b", 1, 6, 36, OFFLOADED, 28.2),
    ],
)
def test_the_measured_points_of_other_setups(
    zero: str, model: str, world: int, micro_batch: int, window: int, changes: dict[str, Any], measured: float
) -> None:
    """Two H100s and one H200 or H100. With kept weights they had been counted twice. The last one is a little further
    off: activations are predicted 0.6 GiB too low throughout, and here little stands beside them."""
    setup = replace(
        setup_of(zero, model, world, micro_batch),
        grad_accum_steps=-(-window // micro_batch),
        logits_chunk=1024,
        **changes,
    )
    assert predict_memory(setup).peak / GIB == pytest.approx(measured, rel=0.025 if changes == OFFLOADED else 0.02)


@pytest.mark.parametrize(
    ("zero", "model", "world", "changes", "measured"),
    [
        ("zero3_single_gpu.json", "3b", 1, {}, 18.7),
        ("zero3.json", "3b", 2, {}, 12.1),
        ("zero3.json", "7b", 2, {}, 22.9),
        ("zero1.json", "3b", 1, LORA, 13.0),
        ("zero3_offload_optimizer.json", "3b", 1, OFFLOADED, 75.1),
    ],
)
def test_the_measured_peaks_of_the_host(
    zero: str, model: str, world: int, changes: dict[str, Any], measured: float
) -> None:
    """docs/performance.md: of a rank's process, its loader processes apart, GiB."""
    host = predict_memory(replace(setup_of(zero, model, world), **changes)).host
    predicted = sum(host.values()) - host["loader processes"]
    assert predicted / GIB == pytest.approx(measured, rel=0.07)


def test_zero_shards_what_it_says() -> None:
    """By hand, for W ranks: ZeRO-3 16 P / W bytes, ZeRO-2 2 P + 14 P / W, ZeRO-1 4 P + 12 P / W."""
    setup = setup_of("zero3.json", world=8)
    P = setup.trained
    for stage, expected in ((3, 16 * P / 8), (2, 2 * P + 14 * P / 8), (1, 4 * P + 12 * P / 8)):
        memory = predict_memory(replace(setup, zero=replace(setup.zero, stage=stage)))
        assert states(memory) == pytest.approx(expected)


def test_offloading_moves_states_to_the_host() -> None:
    setup = setup_of("zero3_offload_optimizer.json", world=2)
    memory, P = predict_memory(setup), setup.trained
    assert states(memory) == pytest.approx(2 * P / 2)
    assert memory.host["float32 weights, gradients and moments"] == pytest.approx((12 + 4 + 2) * P / 2)


@pytest.mark.parametrize(
    ("change", "less"),
    [
        ({"checkpointing": "selective"}, True),
        ({"checkpointing": "full"}, True),
        ({"optimizer": "adamw_8bit"}, True),
        ({"lora_rank": 16, "lora_targets": ("q_proj",)}, True),
        ({"logits_chunk": 128}, True),
        ({"has_tower": False}, True),
        ({"teacher_offload": "none"}, False),
        ({"micro_batch_size": 8}, False),
    ],
)
def test_each_choice_goes_the_right_way(change: dict[str, object], less: bool) -> None:
    setup = setup_of("zero3_single_gpu.json")
    before, after = predict_memory(setup).peak, predict_memory(replace(setup, **change)).peak  # type: ignore[arg-type]
    assert (after < before) == less and after != before


def test_kept_weights_cost_them_whole() -> None:
    setup = setup_of("zero3_kept_weights.json", world=4)
    assert predict_memory(setup).resident["weights kept whole"] == 2 * setup.trained


def test_the_teacher_rests_on_the_host_in_powers_of_two() -> None:
    """At least 4 bytes a weight and rank, less than twice that."""
    for world in (1, 3, 8):
        host = predict_memory(setup_of("zero3.json", world=world)).host
        pinned = host["teacher's weights"] + host["teacher's averages"]
        exact = 4 * KNOWN["3b"].text.language_model / world
        assert 0.999 * exact < pinned < 2 * exact


def test_gradients_may_be_summed_in_float32() -> None:
    """Two bytes a gradient more, also while they wait in buckets, which ZeRO-2 converts when they are sent. Under
    ZeRO-1 and 2 the optimizer reads the sum itself, and no copies of it."""
    for stage, buckets in ((1, 4), (2, 2), (3, 4)):
        setup = setup_of("zero3.json", world=4)
        setup = replace(setup, zero=replace(setup.zero, stage=stage))
        less, more = (predict_memory(replace(setup, sums_in_fp32=on)) for on in (False, True))
        held = setup.trained / (4 if stage > 1 else 1)
        assert (less.resident["gradients"], more.resident["gradients"]) == (2 * held, 4 * held)
        assert more.resident["buckets of gradients"] == buckets * 2 * setup.zero.reduce_bucket
        assert less.resident["buckets of gradients"] == 2 * 2 * setup.zero.reduce_bucket
        saved = less.moments["optimizer"] - more.moments["optimizer"]
        assert saved == {1: (2 + 4) * setup.trained / 4, 2: (2 + 4) * setup.trained / 4, 3: 0}[stage]


def test_a_sum_over_chunks_of_logits_is_a_float32_matrix() -> None:
    """Of the head, with all activations there: two bytes for the products, four for the sum."""
    setup = replace(setup_of("zero3.json"), logits_chunk=64)
    moments = [predict_memory(replace(setup, sums_in_fp32=on)).moments["student"] for on in (False, True)]
    assert moments[1] - moments[0] == 4 * setup.geometry.text.embedding
    whole = replace(setup, logits_chunk=2**20)
    assert len({predict_memory(replace(whole, sums_in_fp32=on)).moments["student"] for on in (False, True)}) == 1


def test_auto_and_absent_sizes_are_deepspeeds_own() -> None:
    zero = Zero.of({"zero_optimization": {"stage": 3, "reduce_bucket_size": "auto"}})
    assert zero == Zero(overlaps=True)


def test_recorded_latents_hold_sums_of_gradients_and_the_keys_and_values() -> None:
    """Under ZeRO-2 alone: the graphs' own memory, as model/latent_pass.py takes it."""
    setup = replace(setup_of("zero2.json"), **CHAIN)
    plain, recorded = (predict_memory(replace(setup, may_record=on)).resident for on in (False, True))
    text = setup.geometry.text
    columns = 2 * 2 * text.layers * text.kv_heads * text.head_dim * 4 * 1024
    layers = text.language_model - text.embedding
    assert recorded["recorded latents"] == 2 * (layers + columns)
    summed = predict_memory(replace(setup, sums_in_fp32=True)).resident["recorded latents"]
    assert summed == 4 * layers + 2 * columns
    assert "recorded latents" not in plain


def test_recorded_latents_without_a_backward_hold_keys_and_values_alone() -> None:
    """As model/latent_pass.py takes them where gradients do not go through the rollout."""
    setup = replace(setup_of("zero2.json"), latent_gradient="detached")
    columns = 2 * setup.geometry.text.layers * setup.geometry.text.kv_heads * setup.geometry.text.head_dim * 4 * 1024
    assert predict_memory(setup).resident["recorded latents"] == 2 * columns


def test_stage_2_with_detached_latents_takes_what_stage_1_takes_and_the_chain_more() -> None:
    """Gradients come layer by layer, and the rollout is over before activations are kept; each pass keeps its own."""
    setup = setup_of("zero3.json", world=2)
    first, detached = (predict_memory(replace(setup, latent_gradient=way)) for way in (None, "detached"))  # type: ignore[arg-type]
    assert detached.peak == first.peak and "own latents" in detached.moments
    one, two, chain = (predict_memory(replace(setup, latent_gradient=way)).peak for way in (1, 2, "full"))  # type: ignore[arg-type]
    kept, _ = activation_bytes(setup)
    activations = setup.micro_tokens * (36 * kept + 14 * 2048)
    assert two - one == pytest.approx(activations)
    assert chain - first.peak == pytest.approx(2 * setup.trained, rel=0.2)


def test_frozen_layers_in_4_bits_are_whole_on_every_rank() -> None:
    setup = replace(setup_of("zero3.json", "7b", world=8), lora_rank=16, lora_targets=("q_proj", "down_proj"))
    full, packed = (predict_memory(replace(setup, has_4_bit_base=on)).resident for on in (False, True))
    text = setup.geometry.text
    matrices = text.layers * text.layer_matrices
    assert packed["frozen layers in 4 bits"] == pytest.approx(0.516 * matrices, rel=1e-3)
    assert full["student's weights"] - packed["student's weights"] == pytest.approx(2 * matrices / 8)
    assert "frozen layers in 4 bits" not in full


def test_the_update_holds_pieces_of_the_student_where_they_are_no_views() -> None:
    """Under ZeRO-3 and on one rank the float32 weights are the optimizer's; under ZeRO-2 ranks exchange them; from the
    host they are copied."""
    pieces = STREAMS * PIECE
    exchanged = 8 * pieces + 4 * (GROUP + KNOWN["3b"].text.embedding // 2)
    cases = (
        ("zero3", 2, 4 * pieces), ("zero2", 2, exchanged), ("zero2", 1, 4 * pieces),
        ("zero3_offload_optimizer", 2, 8 * pieces),
    )  # fmt: skip
    for zero, world, expected in cases:
        setup = replace(setup_of(f"{zero}.json", world=world), has_tower=False)
        assert predict_memory(setup).moments["vision, momentum update"] == expected


@pytest.mark.parametrize(("stage", "world"), [(1, 1), (1, 4), (2, 4)])
def test_gradients_are_copied_together_under_zero_1_and_2(stage: int, world: int) -> None:
    """Beside the activations of all layers but those behind the first full bucket, here two."""
    setup = setup_of("zero3.json", world=world, samples=1)
    text = setup.geometry.text
    setup = replace(setup, zero=replace(setup.zero, stage=stage, reduce_bucket=2 * text.layer), logits_chunk=1)
    kept, _ = activation_bytes(setup)
    by_hand = 2 * setup.trained / world + 2 * text.embedding + 34 * 999 * kept
    assert predict_memory(setup).moments["student"] == pytest.approx(by_hand)
    again = 2 * setup.trained / world + 4 * setup.trained / world
    assert predict_memory(setup).moments["optimizer"] == again + (2 * setup.zero.gather_bucket if world > 1 else 0)
    for change in ({"stage": 3}, {"offloads_optimizer": True}):
        free = replace(setup, zero=replace(setup.zero, **change), world=1)  # type: ignore[arg-type]
        assert predict_memory(free).moments["student"] < by_hand, change
    summed = predict_memory(replace(setup, sums_in_fp32=True)).moments["student"]
    if stage == 1:  # a rank's part, in float32
        assert summed == pytest.approx(by_hand + 2 * setup.trained / world)
    else:  # the sum itself, which is there anyway
        assert summed < by_hand


def test_a_window_s_images_and_features_stay() -> None:
    setup = setup_of("zero3.json", samples=4)
    patches = 8 * setup.sample.patches
    assert predict_memory(setup).resident["images of a window"] == patches * (588 + 2 * 2048 / 4)
    stored = replace(setup, has_tower=False)
    assert predict_memory(stored).resident["images of a window"] == patches * 2 * 2048 / 4


def test_the_teacher_needs_no_more_for_more_micro_batches() -> None:
    """Apart from what exists for every token of a window: embeddings, with images too, and last states. (With 12
    micro-batches and more, the buffers of the prompts' attention are as large as they get.)"""

    def teachers(accum: int, tokens: int = 2 * 4 * 999) -> tuple[str, float]:
        setup = replace(setup_of("zero3.json", samples=4), grad_accum_steps=accum, teacher_tokens=tokens)
        [(name, size)] = [item for item in predict_memory(setup).moments.items() if item[0].startswith("teacher")]
        return name, size

    assert [teachers(accum)[0] for accum in (1, 2, 4, 5)] == [
        "teacher", "teacher", "teacher, in 2 pieces", "teacher, in 3 pieces",
    ]  # fmt: skip
    whole = 3 * 2 * KNOWN["3b"].text.hidden_size * 4 * 999
    assert teachers(16)[1] - teachers(12)[1] == pytest.approx(4 * whole)
    assert teachers(16, 10**9)[1] - teachers(12, 10**9)[1] > 16 * whole


@pytest.mark.parametrize(("name", "measured"), [("comt_3b_24gb", 13.06), ("comt_3b_24gb-stage2", 13.38)])
def test_the_measured_peaks_of_the_recipes_for_one_card(name: str, measured: float) -> None:
    """`python -m tests.bench.one_card` on an H200 capped to 24 GB. Buffers of the prompts' attention had been counted
    as large as they can get: 3 % too much."""
    recipe = load_recipe(shipped.recipes()[name])
    zero = Zero.of(read_deepspeed_json(recipe.deepspeed.config))
    setup = Setup.of(recipe, zero, KNOWN["3b"], 1, SampleSize(tokens=999))
    assert predict_memory(setup).peak / GIB == pytest.approx(measured, rel=0.02)
