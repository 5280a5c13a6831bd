"""Stage 2's losses and how far their gradients go back, against a recompute of every prefix, in float64."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import pytest
import torch
from torch import Tensor

from ilvr_ds.config import LossConfig
from ilvr_ds.data.collate import Collator
from ilvr_ds.data.template import SampleEncoder
from ilvr_ds.data.window import Window
from ilvr_ds.distill.selection import Targets
from ilvr_ds.distill.stage1 import Negatives
from ilvr_ds.distill.stage2 import StageTwo
from ilvr_ds.model.injection import write_images
from ilvr_ds.model.layers.attention import use_packed_attention
from ilvr_ds.model.student import load_config, prepare_student, vision_layout
from tests.distill.test_stage1 import features_of, targets_of
from tests.golden_set import GoldenSet, replace
from tests.model.recompute import recompute
from tests.model.test_latent_pass import GPU
from tests.model.test_rollout import model_of

Gradient = Literal["full", "detached"] | int
K = 3
SAMPLES = [4, 5, 1]
"""With 2, 0 and 2 segments, of 82 to 128 tokens."""
LATENTS = 2 * K
"""In a row after each other: a gradient can pass so many."""
SETTINGS = LossConfig(align_weight=0.7, contrastive_weight=0.3, target_noise_std=0.0, logits_chunk=7)


@pytest.fixture(scope="module")
def model(golden: GoldenSet) -> Any:
    return model_of(golden)


def window_of(golden: GoldenSet, rows: Any) -> Window:
    """SAMPLES in one micro-batch, with K slots a segment and their helper images."""
    encoder = SampleEncoder(golden.encoder.tokenizer, golden.encoder.special, golden.encoder.images, K, 2**20)
    layout = vision_layout(load_config(str(golden.folder)))
    collator = Collator(encoder.special, layout, K, golden.selection.group_size, rows, free_latents=True)
    return collator([encoder(golden.samples[i]) for i in SAMPLES], np.array(SAMPLES), [len(SAMPLES)])


def losses_by_hand(model: Any, hidden: Tensor, window: Window, targets: Targets | None) -> dict[str, Tensor]:
    """Sums of cross-entropy, of 1 - cosine to each slot's target, and of InfoNCE against what was not selected."""
    micro, temperature = window.micro_batches[0], SETTINGS.contrastive_temperature
    logits = model.lm_head(hidden[micro.label_rows])
    sums = {"ce": torch.nn.functional.cross_entropy(logits, micro.label_ids, reduction="sum")}
    if targets is None:
        return sums
    sums |= {"alignment": hidden.new_zeros(()), "contrastive": hidden.new_zeros(())}
    unit = torch.nn.functional.normalize(targets.candidates, dim=1)
    for segment, slots in enumerate(micro.latent_slots.tolist()):
        chosen = [row for row in targets.indices[segment].tolist() if row >= 0]
        mine = range(int(targets.offsets[segment]), int(targets.offsets[segment + 1]))
        negatives = unit[[row for row in mine if row not in chosen]]
        for position, row in zip(slots, chosen, strict=False):
            latent = hidden[position - 1] / hidden[position - 1].norm()
            cosine = latent @ unit[row]
            sums["alignment"] += 1 - cosine
            scores = torch.cat([cosine[None], negatives @ latent]) / temperature
            sums["contrastive"] += scores.logsumexp(0) - scores[0]
    return sums


def total(sums: dict[str, Tensor]) -> Tensor:
    weights = {"ce": 1.0, "alignment": SETTINGS.align_weight, "contrastive": SETTINGS.contrastive_weight}
    return torch.stack([weight * sums[name] for name, weight in weights.items() if name in sums]).sum()


def grads_of(model: Any, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}


class ExactHead(torch.nn.Linear):
    """A head that computes the cross-entropy in float64 where the model's own takes float32."""

    def forward(self, hidden: Tensor, labels: Tensor, chunk: int) -> Any:
        logits = super().forward(hidden)
        return torch.nn.functional.cross_entropy(logits, labels, reduction="none"), logits.argmax(-1)


class Scaled(torch.autograd.Function):
    """Values as they are, gradients times a factor."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return values.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return ctx.factor * grad, None


@pytest.fixture(scope="module")
def expected(golden: GoldenSet, model: Any) -> dict[str, Any]:
    """Losses, hidden states and, for each number of latents passed, the gradients along paths through just so many.

    Where each latent that is fed back scales the gradient by x, the gradient is a polynomial in x whose coefficient n
    is that of the paths through n latents: it is computed at as many x as there are coefficients, and solved for.
    """
    window = window_of(golden, "right")
    micro, features = window.micro_batches[0], features_of(window, model)
    targets = targets_of(window, features, K).of(micro)
    language_model = model.model.language_model
    points = np.cos(np.pi * (np.arange(LATENTS + 1) + 0.5) / (LATENTS + 1))
    inverse = torch.from_numpy(np.linalg.inv(np.vander(points, increasing=True)))
    result: dict[str, Any] = {"hidden": None}
    for name, wanted in (("text", None), ("text and targets", targets)):
        grads = []
        for point in points:
            embeddings = write_images(language_model.embed_tokens(micro.tokens.input_ids), micro.tokens, features)
            hidden = recompute(
                language_model, embeddings, micro.tokens, micro.latent_slots, micro.sample_of_segment,
                lambda latents, x=float(point): Scaled.apply(latents, x),
            )  # fmt: skip
            sums = losses_by_hand(model, hidden.flatten(0, 1), window, wanted)
            grads.append(grads_of(model, total(sums)))
        result["hidden"] = [row[real] for row, real in zip(hidden.detach(), micro.tokens.real, strict=True)]
        parts = {n: torch.einsum("np,p...->n...", inverse, torch.stack([g[n] for g in grads])) for n in grads[0]}
        result[name] = {"sums": {key: float(value.detach()) for key, value in sums.items()}, "parts": parts}
    return result


@pytest.mark.parametrize("rows", ["packed", "left"])
@pytest.mark.parametrize("name", ["text", "text and targets"])
@pytest.mark.parametrize("gradient", ["full", "detached", 1, 2, LATENTS, 99])
def test_losses_and_gradients(
    golden: GoldenSet, expected: dict[str, Any], gradient: Gradient, name: str, rows: str
) -> None:
    """Catches gradients that are cut too early or too late, targets of another slot, and passes that read other latents
    than those that the student feeds itself."""
    if gradient == "full" and rows == "packed":
        pytest.skip("the rollout with gradients has rows of its own")
    model = model_of(golden)
    if rows == "packed":
        use_packed_attention(model.model.language_model, "sdpa", torch.device("cpu"), torch.float64)
    window = window_of(golden, rows)
    micro, features = window.micro_batches[0], features_of(window, model)
    stage = StageTwo(model, SETTINGS, 0, K, gradient)
    model.lm_head.__class__ = ExactHead
    targets = targets_of(window, features, K).of(micro) if name == "text and targets" else None
    hidden = stage.hidden(micro, features).detach().flatten(0, 1)
    states = hidden[micro.tokens.real.flatten()].split([len(row) for row in expected["hidden"]])
    for row, wanted in zip(states, expected["hidden"], strict=True):
        assert float((row - wanted).abs().max()) < 1e-10
    sums = stage(micro, features, targets)
    assert {"alignment", "contrastive"} & set(sums) == set(expected[name]["sums"]) - {"ce"}
    for key, value in expected[name]["sums"].items():
        assert float(sums[key].detach()) == pytest.approx(value, rel=1e-9), key
    assert torch.equal(sums["prediction"], hidden[micro.latent_slots - 1])
    most = {"full": LATENTS, "detached": 0}.get(gradient, gradient)  # type: ignore[call-overload]
    grads = grads_of(model, total(sums))
    assert grads.keys() == expected[name]["parts"].keys()
    for key, parts in expected[name]["parts"].items():
        wanted = parts[: most + 1].sum(0)
        assert float((grads[key] - wanted).norm() / wanted.norm()) < 1e-8, key


def test_the_cases_differ(expected: dict[str, Any]) -> None:
    """Else the test above could not tell them apart."""
    for name, parts in expected["text and targets"]["parts"].items():
        sums = parts.cumsum(0)
        differ = [float((sums[n] - sums[n + 1]).norm() / sums[n].norm()) > 1e-6 for n in range(3)]
        assert all(differ) or name == "lm_head.weight", name  # of which no path comes from a latent


@pytest.mark.parametrize("device", ["cpu", GPU])
@pytest.mark.parametrize("kind", ["full", "selective"])
@pytest.mark.parametrize("is_recorded", [False, True], ids=["called", "recorded"])
@pytest.mark.parametrize("gradient", ["detached", 1])
def test_checkpointing_and_recording_change_nothing(
    golden: GoldenSet, gradient: Gradient, is_recorded: bool, kind: Literal["full", "selective"], device: str
) -> None:
    """Catches layers that drop their cache because they are checkpointed, and a backward on the rollout's attention."""
    on = torch.device(device)
    results = []
    for checkpointing in ("none", kind):
        model = model_of(golden)
        prepare_student(model, replace(golden.model, activation_checkpointing=checkpointing))
        model.to(on)
        window = window_of(golden, "left")
        features = features_of(window, model)
        recorded = is_recorded and checkpointing == kind
        stage = StageTwo(model, SETTINGS, 0, K, gradient, has_recorded_latents=recorded).train()
        targets = targets_of(window, features, K).of(window.micro_batches[0])
        targets = replace(targets, **{k: v.to(on) for k, v in vars(targets).items() if v is not None})
        sums = stage(window.micro_batches[0].to(on), features.to(on), targets)
        results.append((float(sums["ce"].detach()), grads_of(model, total(sums))))
    (plain, plain_grads), (loss, grads) = results
    assert loss == pytest.approx(plain, rel=1e-12)
    for name, grad in grads.items():
        assert float((grad - plain_grads[name]).norm() / plain_grads[name].norm()) < 1e-10, name


def test_passes_without_a_backward_hold_no_gradients(golden: GoldenSet, model: Any) -> None:
    """The sums of the weights' gradients alone would take 5 GiB at 3B."""
    window = window_of(golden, "right")
    stages = [StageTwo(model_of(golden), SETTINGS, 0, K, gradient, False, True) for gradient in ("detached", "full")]
    for stage in stages:
        stage.hidden(window.micro_batches[0], features_of(window, model))
    detached, full = (stage.latent_passes for stage in stages)
    assert detached is not None and full is not None
    assert not detached.sums and full.sums
    assert 2 * detached.buffer.numel() == full.buffer.numel()


def test_without_gradients_the_latents_are_read_once(golden: GoldenSet, model: Any) -> None:
    """Held-out evaluation pays nothing for gradients that pass several latents."""
    window = window_of(golden, "right")
    stage = StageTwo(model, SETTINGS, 0, K, 4).eval()
    calls = []
    handle = model.model.language_model.register_forward_hook(lambda *_: calls.append(1))
    with torch.no_grad():
        stage(window.micro_batches[0], features_of(window, model))
    assert len(calls) == 1
    stage(window.micro_batches[0], features_of(window, model))
    handle.remove()
    assert len(calls) == 1 + 5


def test_noise_and_other_ranks_negatives_are_those_of_stage_1(golden: GoldenSet, model: Any) -> None:
    """Noise is drawn anew at each step of training, not in evaluation; foreign candidates raise the InfoNCE loss."""
    window = window_of(golden, "right")
    micro, features = window.micro_batches[0], features_of(window, model)
    targets = targets_of(window, features, K).of(micro)
    settings = replace(SETTINGS, target_noise_std=0.5, contrastive_negatives="world")
    stage = StageTwo(model, settings, 1, K, "detached").train()
    with torch.no_grad():
        first, again, later = (float(stage(micro, features, targets, step)["alignment"]) for step in (3, 3, 4))
        assert first == again != later
        stage.eval()
        plain, evaluated = stage(micro, features, targets, 3), stage(micro, features, targets, 4)
        assert torch.equal(plain["alignment"], evaluated["alignment"])
        more = stage(micro, features, targets, 3, Negatives(features[:5], torch.full((5,), 99)))
    assert float(more["contrastive"]) > float(plain["contrastive"])
    assert torch.equal(more["alignment"], plain["alignment"])
