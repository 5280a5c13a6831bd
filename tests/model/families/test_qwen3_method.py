"""The method on Qwen3-VL against a slow reference of its own: stock modules, one sample at a time, plain loops.

Queries, selection, losses and their gradients of stage 1 on a window of samples with several images and with none. The
reference knows nothing of windows, indices or operators; only tokens and labels are the encoder's.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, cross_entropy
from transformers import AutoModelForImageTextToText

from ilvr_ds.config import LossConfig, SelectionConfig
from ilvr_ds.distill.query import ContextEncoder
from ilvr_ds.distill.selector import Selector
from ilvr_ds.distill.stage1 import StageOne
from ilvr_ds.distill.teacher import MomentumTeacher
from ilvr_ds.model.layers.attention import use_packed_attention
from ilvr_ds.model.student import build_text_model, load_student
from tests.model.conftest import tower_of
from tests.model.families.test_qwen3_vl import ALL, CPU, pixels_of, stock_inputs
from tests.qwen3_set import Qwen3Set, qwen3_set

SELECTION = SelectionConfig(temperature=0.05, top_p=0.6)
LOSS = LossConfig(contrastive_weight=0.3, contrastive_temperature=0.2, target_noise_std=0.0)


@pytest.fixture(scope="module")
def golden(tmp_path_factory: pytest.TempPathFactory) -> Qwen3Set:
    return qwen3_set(tmp_path_factory.mktemp("method") / "model")


class Slow:
    """The method on one sample, by the stock model's own modules."""

    def __init__(self, golden: Qwen3Set, stock: Any, number: int) -> None:
        self.golden, self.stock, self.special = golden, stock, golden.encoder.special
        self.sample, self.encoded = golden.samples[number], golden.encoded[number]
        self.inputs = stock_inputs(golden, number)
        self.ids = self.inputs["input_ids"][0]
        self.is_image = self.ids == self.special.image_pad

    @torch.no_grad()
    def targets(self) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        """Of each segment its candidates [P, D], the rows that are selected, and its query [D]."""
        hidden = self.stock(**self.inputs, output_hidden_states=True).hidden_states[-1][0]
        user, begin = self._user(hidden), self.encoded.assistant
        chosen, picked, queries = [], [], []
        found = self._candidates()
        for first, candidates in zip(self.encoded.segments.tolist(), found, strict=True):
            text = [t for t in range(begin, first) if self.ids[t] not in self._without_text()]
            parts = [user, *([hidden[text].mean(0)] if text else []), *([picked[-1].mean(0)] if picked else [])]
            queries.append(torch.stack(parts).mean(0))
            rows = self._select(cosine_similarity(candidates, queries[-1][None]))
            chosen.append(rows)
            picked.append(candidates[rows])
            begin = first + self.golden.settings["latent_size"] + 1
        return found, chosen, queries

    def _user(self, hidden: Tensor) -> Tensor:
        before = torch.arange(len(self.ids)) < self.encoded.assistant
        words = torch.tensor([i not in self._without_text() and i != self.special.image_pad for i in self.ids.tolist()])
        prompt, image = before & words, before & self.is_image
        if not image.any():
            return self.stock.get_input_embeddings()(self.ids[prompt]).mean(0)
        layer = self.stock.model.language_model.layers[-1].self_attn
        config, d = self.stock.config.text_config, layer.head_dim
        mass = torch.zeros(int(prompt.sum()), int(image.sum()))
        for head in range(config.num_attention_heads):
            pair = head * config.num_key_value_heads // config.num_attention_heads
            query = layer.q_norm(layer.q_proj(hidden[prompt])[:, head * d : (head + 1) * d])
            key = layer.k_norm(layer.k_proj(hidden[image])[:, pair * d : (pair + 1) * d])
            mass += (query @ key.T / d**0.5).softmax(dim=1)
        weights = mass.sum(0) / mass.sum()
        return (weights @ hidden[image] + hidden[prompt].mean(0)) / 2

    def _without_text(self) -> tuple[int, ...]:
        s = self.special
        return (s.latent_pad, s.latent_start, s.latent_end, s.vision_start, s.vision_end)

    def _candidates(self) -> list[Tensor]:
        """Merged features of the tower's last block, without what deepstack adds."""
        found = []
        for data in self.sample.helper_images:
            pixels = pixels_of(self.golden, replace(self.sample, input_images=(data,)))
            rows = self.stock.model.visual(pixels["pixel_values"], grid_thw=pixels["image_grid_thw"]).pooler_output
            size = self.golden.selection.group_size
            run = max(1, len(rows) // size)
            if len(rows) >= size:
                rows = rows[: size * run]
            found.append(torch.stack([part.mean(0) for part in rows.split(run)]))
        return found

    def _select(self, cosine: Tensor) -> Tensor:
        chance = (cosine / SELECTION.temperature).softmax(0)
        kept: list[int] = []
        for row in chance.argsort(descending=True, stable=True).tolist():
            kept.append(row)
            if chance[kept].sum() >= SELECTION.top_p or len(kept) == self.golden.settings["latent_size"]:
                break
        return torch.tensor(kept)

    def losses(self) -> dict[str, Tensor]:
        """Sums of the three losses, with gradients."""
        candidates, chosen, _ = self.targets()
        embeddings = self.stock.get_input_embeddings()(self.ids)
        added: Any = None
        if self.is_image.any():
            seen = self.stock.model.visual(self.inputs["pixel_values"], grid_thw=self.inputs["image_grid_thw"])
            place = self.is_image.nonzero()[:, 0]
            embeddings = embeddings.index_copy(0, place, seen.pooler_output.detach())
            added = [rows.detach() for rows in seen.deepstack_features]
        first = self.encoded.segments.tolist()
        for start, rows, picture in zip(first, chosen, candidates, strict=True):
            embeddings = embeddings.index_copy(0, torch.arange(start, start + len(rows)), picture[rows])
        hidden = self.stock.model.language_model(
            inputs_embeds=embeddings[None],
            position_ids=torch.from_numpy(self.encoded.position_ids)[:, None],
            visual_pos_masks=self.is_image[None] if added else None,
            deepstack_visual_embeds=added,
        ).last_hidden_state[0]
        labels = torch.from_numpy(self.encoded.labels)
        sums = {"ce": cross_entropy(self.stock.lm_head(hidden[:-1]), labels[1:], reduction="sum")}
        sums |= {"alignment": torch.zeros(()), "contrastive": torch.zeros(())}
        for start, rows, picture in zip(first, chosen, candidates, strict=True):
            others = [row for row in range(len(picture)) if row not in rows.tolist()]
            for slot, row in enumerate(rows.tolist()):
                cosine = cosine_similarity(hidden[start + slot - 1][None], picture)
                sums["alignment"] = sums["alignment"] + 1 - cosine[row]
                logits = torch.cat([cosine[row, None], cosine[others]]) / LOSS.contrastive_temperature
                sums["contrastive"] = sums["contrastive"] + (logits.logsumexp(0) - logits[0] if others else 0)
        return sums


def total(sums: dict[str, Tensor], tokens: int, slots: int) -> Tensor:
    ce = LOSS.ce_weight * sums["ce"] / tokens
    return ce + (LOSS.align_weight * sums["alignment"] + LOSS.contrastive_weight * sums["contrastive"]) / slots


@pytest.mark.parametrize("rows", ["packed", "left"])
def test_stage_1_is_the_slow_reference(golden: Qwen3Set, rows: str) -> None:
    stock = AutoModelForImageTextToText.from_pretrained(golden.weights, dtype=torch.float32).eval()
    stock.model.visual.requires_grad_(False)
    slow = [Slow(golden, stock, number) for number in ALL]
    wanted = [one.targets() for one in slow]
    size = golden.settings["latent_size"]
    kept = [len(picked) for _, chosen, _ in wanted for picked in chosen]
    assert len(set(kept)) > 1 and max(kept) <= size, "the case must not be one where all slots are filled"

    model = load_student(golden.model, torch.float32, 0)
    tower = tower_of(model, golden.encoder.images)
    language_model = model.model.language_model
    reader = build_text_model(language_model.config, "sdpa")
    reader.load_state_dict(language_model.state_dict())
    if rows == "packed":
        for network in (language_model, reader):
            use_packed_attention(network, "sdpa", CPU, torch.float32)
    window = golden.window(ALL, len(ALL), rows)
    micro, features = window.micro_batches[0], tower.features(window)
    nothing: Any = None
    teacher = MomentumTeacher(ContextEncoder(reader.eval()), nothing, nothing, micro_batches_at_once=1)
    selector = Selector(SELECTION, size, language_model.config.hidden_size)
    own = selector(window, features, teacher.read(window, features)).of(micro)
    seen = dict.fromkeys(ALL, 0)
    for m, number in enumerate(micro.sample_of_segment.tolist()):
        candidates, chosen, query = (part[seen[number]] for part in wanted[number])
        seen[number] += 1
        first, last = own.offsets[m : m + 2].tolist()
        torch.testing.assert_close(own.candidates[first:last], candidates, rtol=1e-5, atol=1e-5)
        assert own.query is not None
        torch.testing.assert_close(own.query[m], query, rtol=1e-5, atol=1e-5)
        assert (own.indices[m][own.indices[m] >= 0] - first).tolist() == chosen.tolist()
    assert [seen[number] for number in ALL] == [len(chosen) for _, chosen, _ in wanted]

    stage = StageOne(model, LOSS, seed=0)
    sums = stage(micro, features, own, 0)
    expected = [one.losses() for one in slow]
    tokens, slots = len(micro.label_ids), sum(kept)
    for name in ("ce", "alignment", "contrastive"):
        assert float(sums[name]) == pytest.approx(float(sum(one[name] for one in expected)), rel=1e-5), name
    total(sums, tokens, slots).backward()
    torch.stack([total(one, tokens, slots) for one in expected]).sum().backward()
    grads = {name: weight.grad for name, weight in stock.named_parameters() if weight.grad is not None}
    found = {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}
    assert found.keys() == grads.keys()
    for name, grad in grads.items():
        assert (found[name] - grad).norm() < 1e-5 * grad.norm(), name
