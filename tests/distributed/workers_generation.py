"""Free answers of a student between its optimizer steps, on the test's ranks."""

from __future__ import annotations

import dataclasses
from typing import Any
from unittest.mock import patch

import torch

from ilvr_ds import dist
from ilvr_ds.evaluation.benchmarks import find_benchmark
from ilvr_ds.generation.loading import Reasoner
from ilvr_ds.generation.settings import GenerationSettings
from ilvr_ds.training import free_answers
from ilvr_ds.training.free_answers import FreeAnswers, Question
from tests.golden_set import GoldenSet, golden_set
from tests.runs import SmallRun, golden_recipe

SHORT = 6
"""Tokens after which rank 1 has ended."""


def answers_between_steps(zero: dict[str, Any]) -> dict[str, Any]:
    """Free answers of this rank's samples before the first step, and the losses of two steps with and without."""
    answers: list[list[int]] = []
    metrics: dict[str, float] = {}
    losses: list[Any] = []
    moves: list[None] = []
    for has_answers in (True, False):
        run = SmallRun.start(golden_recipe(golden_set()), zero)
        mine = list(range(dist.rank(), len(run.golden.samples), dist.world_size()))
        if has_answers:
            run.networks.student.eval()
            free = _free_answers(run, mine)
            before = run.networks.student.module.model.model.language_model.config._attn_implementation
            answers = [answer.tokens for answer in free.answers()]
            with patch.object(free_answers, "TOKENS_AT_ONCE", 1):  # one after the other, on all ranks alike
                metrics = free(lambda: moves.append(None))
            assert moves, "a token of an answer is a move"
            after = run.networks.student.module.model.model.language_model.config._attn_implementation
            assert before == after
            run.networks.student.train()
        window = run.window(mine, 1)
        losses.append([run.train(window, step) for step in range(2)])
    return {"answers": answers, "metrics": metrics, "losses": losses}


def _free_answers(run: SmallRun, mine: list[int]) -> FreeAnswers:
    golden, encoder = run.golden, run.golden.encoder
    expected = golden.expected[f"{golden.samples[mine[0]].id}.gen.new_ids"].flatten().tolist()
    reasoner = Reasoner(
        model=run.networks.student.module.model,
        tower=run.networks.vision,  # type: ignore[arg-type]
        encoder=encoder,
        latent_size=run.recipe.model.latent_size,
        stop_ids=(expected[SHORT - 1],) if dist.rank() == 1 else (),
        device=torch.device("cpu"),
    )
    start = encoder.special.latent_start
    forbidden = tuple(golden.settings["special_ids"][name] for name in ("<|im_end|>", "<|endoftext|>"))
    settings = GenerationSettings(max_new_tokens=len(expected), forced={2: start, 20: start}, forbidden=forbidden)
    return FreeAnswers(reasoner, [_question(golden, index) for index in mine], settings)


def _question(golden: GoldenSet, index: int) -> Question:
    """With the prompt that the released code generated from."""
    sample = golden.samples[index]
    prompt = golden.encoder.prompt(sample)
    ids = golden.expected[f"{sample.id}.gen.prompt_ids"].flatten().numpy()
    positions = golden.encoder.positions(ids, list(prompt.grids))
    prompt = dataclasses.replace(prompt, input_ids=ids, position_ids=positions)
    return Question(sample, prompt, find_benchmark("comt"), 0)
