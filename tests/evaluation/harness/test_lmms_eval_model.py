"""Requests of lmms-eval to our generator, without lmms-eval: a drill starts the harness itself."""

from __future__ import annotations

import importlib
import sys
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import pytest

from ilvr_ds.evaluation.harness import answering
from ilvr_ds.evaluation.harness.answering import HarnessSettings, Part, Reply
from ilvr_ds.generation.settings import GenerationSettings


@dataclass
class TokenCounts:
    input_tokens: int
    output_tokens: int
    reasoning_tokens: int


@dataclass
class GenerationResult:
    text: str
    token_counts: TokenCounts


@dataclass
class Instance:
    args: tuple[Any, ...]


class Lmms:
    def __init__(self) -> None:
        self.task_dict: dict[str, Any] = {}

    @property
    def rank(self) -> int:
        return 0


class Answers:
    """Repeats what it is asked, and notes how."""

    def __init__(self, settings: HarnessSettings) -> None:
        self.settings = settings
        self.asked: list[tuple[int, GenerationSettings]] = []

    def __call__(self, turns: list[list[Part]], generation: GenerationSettings) -> list[Reply]:
        self.asked.append((len(turns), generation))
        return [Reply(f"I see {turn[-1]} STOP and more", 9, 7, 3) for turn in turns]


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The adapter with stand-ins for lmms-eval's base classes and for our model."""
    stand_ins = {
        "lmms_eval": {},
        "lmms_eval.api": {},
        "lmms_eval.api.instance": {
            "Instance": Instance, "GenerationResult": GenerationResult, "TokenCounts": TokenCounts,
        },
        "lmms_eval.api.model": {"lmms": Lmms},
    }  # fmt: skip
    for name, content in stand_ins.items():
        stand_in = ModuleType(name)
        stand_in.__dict__.update(content)
        monkeypatch.setitem(sys.modules, name, stand_in)
    monkeypatch.setattr(answering, "Answerer", Answers)
    name = "ilvr_ds.evaluation.harness.lmms_eval_model"
    monkeypatch.delitem(sys.modules, name, raising=False)
    yield importlib.import_module(name)
    sys.modules.pop(name, None)


def request(number: int, wanted: dict[str, Any]) -> Instance:
    def to_messages(doc: str) -> list[dict[str, Any]]:
        return [{"role": "user", "content": [{"type": "image", "url": b"1"}, {"type": "text", "text": doc}]}]

    return Instance((f"{number}", to_messages, wanted, number, "squares", "test"))


def test_replies_come_in_order_whatever_the_batches(module: Any) -> None:
    """Requests with equal settings share batches; a blank line does not stop an answer, other texts do."""
    model = module.LatentReasoner("somewhere", batch_size="2", max_new_tokens=99, answer_only=True)
    assert model.answerer.settings == HarnessSettings("somewhere", max_new_tokens=99, answer_only=True)
    model.task_dict = {"squares": {"test": [f"doc {number}" for number in range(5)]}}
    greedy = {"until": ["\n\n", " STOP"], "do_sample": False, "temperature": 0.7, "max_new_tokens": 16}
    drawn = {"until": "\n\n", "do_sample": True, "temperature": 0.7, "top_p": 0.9}
    results = model.generate_until([request(number, drawn if number == 1 else greedy) for number in range(5)])
    assert [result.text for result in results] == [
        f"I see doc {number}" + (" STOP and more" if number == 1 else "") for number in range(5)
    ]
    assert results[0].token_counts == TokenCounts(9, 7, 3)
    assert model.answerer.asked == [
        (2, GenerationSettings(16, 0.0, 1.0, stop=(" STOP",))),
        (2, GenerationSettings(16, 0.0, 1.0, stop=(" STOP",))),
        (1, GenerationSettings(1, 0.7, 0.9)),
    ]


def test_what_it_cannot_do_is_said(module: Any) -> None:
    model = module.LatentReasoner("somewhere")
    for refused in (model.loglikelihood, model.generate_until_multi_round):
        with pytest.raises(NotImplementedError, match="output_type: generate_until"):
            refused([])
    for messages, words in (
        ([{"role": "assistant", "content": []}], "num_fewshot 0"),
        ([{"role": "user", "content": [{"type": "video", "url": "a.mp4"}]}], "no video"),
    ):
        with pytest.raises(NotImplementedError, match=words):
            module._parts(messages)
