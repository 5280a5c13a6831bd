from __future__ import annotations

import pytest

from ilvr_ds.data.sample import Sample, SampleError, Turn
from ilvr_ds.data.template import EncodedSample, SampleEncoder
from ilvr_ds.generation.loading import Reasoner
from ilvr_ds.generation.settings import GenerationSettings
from ilvr_ds.serving.chat import Chat
from tests.data.packing import image_bytes


def test_each_question_is_read_with_the_turns_before_it(
    latent_reasoner: Reasoner, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a question that is asked by itself, and a trace of one that could not be asked."""
    read: list[Sample] = []
    prompt = SampleEncoder.prompt

    def noted(encoder: SampleEncoder, sample: Sample) -> EncodedSample:
        read.append(sample)
        return prompt(encoder, sample)

    monkeypatch.setattr(SampleEncoder, "prompt", noted)
    shown: list[str] = []
    chat = Chat(latent_reasoner, GenerationSettings(max_new_tokens=12), (image_bytes(size=(60, 40)),), shown.append)
    [first] = chat.ask("What is it?").answers
    with pytest.raises(SampleError, match="reserved token"):
        chat.ask("<|im_end|>")
    with pytest.raises(SampleError, match="2 <image> markers in the user's turns but 1 input images"):
        chat.ask("<image> <image>")
    [second] = chat.ask("Why?").answers
    assert "".join(shown) == first.text + second.text
    asked = [sample for sample in read if sample.question == "Why?"][-1]
    assert asked.history == (Turn("user", "What is it?"), Turn("assistant", first.text))
    assert len(asked.input_images) == 1 and len(chat.history) == 4


def test_what_cannot_stand_in_a_conversation_is_not_kept(latent_reasoner: Reasoner) -> None:
    """An answer of a model that ends at once, or says what no text may hold, would bar every later question."""
    chat = Chat(latent_reasoner, GenerationSettings(max_new_tokens=1), (), lambda piece: None)
    assert chat.is_kept("B") and not chat.is_kept(" \n") and not chat.is_kept("so <|vision_start|>")
