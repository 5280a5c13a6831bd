"""A conversation about some images: each question is read with the turns before it.

A model was trained on earlier turns as text, so the history holds words alone: latents of earlier answers are gone.
Every turn reads the whole conversation anew.
"""

from __future__ import annotations

from collections.abc import Callable

from ilvr_ds.data.check import check_sample
from ilvr_ds.data.sample import Sample, SampleError, Turn
from ilvr_ds.generation.generate import Generated, Generator
from ilvr_ds.generation.loading import Reasoner
from ilvr_ds.generation.settings import GenerationSettings


class Chat:
    """Asks one question after another; on_text gets the answer as it comes."""

    def __init__(
        self,
        reasoner: Reasoner,
        settings: GenerationSettings,
        images: tuple[bytes, ...],
        on_text: Callable[[str], None],
    ) -> None:
        self.reasoner = reasoner
        self.images = images
        self.history: tuple[Turn, ...] = ()
        self._generator = Generator(reasoner, settings, on_text=lambda row, piece: on_text(piece))
        self._asked = 0

    def ask(self, question: str) -> Generated:
        """The answer, which the history holds from now on, unless `is_kept` says otherwise.

        The images stand before the first question that is kept, or at its `<image>` markers. Raises SampleError for a
        question that cannot be asked.
        """
        self._asked += 1
        sample = Sample(f"question {self._asked}", question, (), self.images, history=self.history)
        check_sample(sample)
        generated = self._generator([self.reasoner.encoder.prompt(sample)])
        [answer] = generated.answers
        if self.is_kept(answer.text):
            self.history += (Turn("user", question), Turn("assistant", answer.text))
        return generated

    def is_kept(self, text: str) -> bool:
        """Whether an answer can stand in a conversation: an empty one cannot, nor one with reserved tokens."""
        try:
            self.reasoner.encoder.prompt(Sample("answer", text, ()))
        except SampleError:
            return False
        return bool(text.strip())
