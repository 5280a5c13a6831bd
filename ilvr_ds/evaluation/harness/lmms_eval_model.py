"""Our models in lmms-eval (0.7): `lmms-eval --model ilvr_ds --model_args pretrained=DIR --tasks vstar_bench`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from accelerate import Accelerator
from lmms_eval.api.instance import GenerationResult, Instance, TokenCounts
from lmms_eval.api.model import lmms
from tqdm import tqdm

from ilvr_ds.evaluation.harness.answering import Answerer, HarnessSettings, Part
from ilvr_ds.generation.settings import GenerationSettings

_BLANK_LINE = "\n\n"
"""lmms-eval's own stop text, which would end a rationale at its first paragraph; its Qwen models drop it too."""


class LatentReasoner(lmms):  # type: ignore[misc]
    """A chat model of lmms-eval. Its arguments are those of HarnessSettings, with `pretrained` for the model.

    The latent steps of an answer are its reasoning tokens in the logged samples.
    """

    is_simple = False

    def __init__(
        self,
        pretrained: str,
        batch_size: int | str = 1,
        device: str | None = None,
        max_batch_size: int | None = None,
        **settings: Any,
    ) -> None:
        super().__init__()
        self.accelerator = Accelerator()
        self._rank, self._world_size = self.accelerator.process_index, self.accelerator.num_processes
        self.batch_size = int(batch_size)
        self.answerer = Answerer(HarnessSettings(model=pretrained, **settings))

    def generate_until(self, requests: list[Instance]) -> list[GenerationResult]:
        """Answer all requests, those with the same generation settings in batches."""
        replies: dict[int, GenerationResult] = {}
        bar = tqdm(total=len(requests), disable=self.rank != 0, desc="ilvr_ds answers")
        for batch in _batches([request.args[2] for request in requests], self.batch_size):
            turns = [self._turn(requests[number].args) for number in batch]
            settings, stops = _generation(requests[batch[0]].args[2])
            for number, reply in zip(batch, self.answerer(turns, settings), strict=True):
                counts = TokenCounts(reply.prompt_tokens, reply.new_tokens, reply.latent_steps)
                replies[number] = GenerationResult(_until(reply.text, stops), counts)
            bar.update(len(batch))
        bar.close()
        return [replies[number] for number in range(len(requests))]

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        """Not there: an answer's likelihood would depend on latents that the model makes before it."""
        raise NotImplementedError("ilvr_ds answers questions; take a task with output_type: generate_until")

    def generate_until_multi_round(self, requests: list[Instance]) -> list[str]:
        """Not there: the models are trained on one turn."""
        raise NotImplementedError("ilvr_ds answers single questions; take a task with output_type: generate_until")

    def _turn(self, args: tuple[Any, ...]) -> list[Part]:
        _, doc_to_messages, _, doc_id, task, split = args
        return _parts(doc_to_messages(self.task_dict[task][split][doc_id]))


def _parts(messages: Iterable[dict[str, Any]]) -> list[Part]:
    """The words and pictures of a user's turn, after those of a system turn."""
    parts: list[Part] = []
    for message in messages:
        if message["role"] == "assistant":
            raise NotImplementedError(
                "ilvr_ds answers single questions; take a task without examples (--num_fewshot 0)"
            )
        for content in message["content"]:
            if content["type"] not in ("text", "image"):
                raise NotImplementedError(f"ilvr_ds reads words and pictures, no {content['type']}")
            parts.append(content["text"] if content["type"] == "text" else content["url"])
    return parts


def _batches(settings: Sequence[dict[str, Any]], size: int) -> list[list[int]]:
    """Numbers of requests in batches of at most `size` with equal settings."""
    alike: dict[str, list[int]] = {}
    for number, setting in enumerate(settings):
        alike.setdefault(repr(sorted(setting.items())), []).append(number)
    return [numbers[start : start + size] for numbers in alike.values() for start in range(0, len(numbers), size)]


def _generation(wanted: dict[str, Any]) -> tuple[GenerationSettings, tuple[str, ...]]:
    """A task's settings as ours, and the texts that an answer ends before."""
    until = wanted.get("until") or []
    stops = tuple(stop for stop in ([until] if isinstance(until, str) else until) if stop and stop != _BLANK_LINE)
    sampled = wanted.get("do_sample", True)
    settings = GenerationSettings(
        max_new_tokens=int(wanted.get("max_new_tokens") or 1),
        temperature=float(wanted.get("temperature") or 0.0) if sampled else 0.0,
        top_p=float(wanted.get("top_p") or 1.0),
        stop=stops,
    )
    return settings, stops


def _until(text: str, stops: tuple[str, ...]) -> str:
    return text[: min((text.index(stop) for stop in stops if stop in text), default=len(text))]
