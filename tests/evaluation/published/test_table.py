"""Prompts word for word, options, answers and pictures of each published data set, and the figures reported of it."""

from __future__ import annotations

from pathlib import Path

import pytest

from ilvr_ds.data.sample import Sample
from ilvr_ds.evaluation.benchmarks import find_benchmark
from ilvr_ds.evaluation.published.benchmark import Published
from ilvr_ds.evaluation.published.reader import open_published
from ilvr_ds.evaluation.published.table import PUBLISHED
from tests.data.packing import image_bytes
from tests.evaluation.published import copies

QUESTIONS = {
    "vstar": "What is the colour of thing 1?\n(A) red 1\n(B) blue 1\n(C) green 1\n(D) white 1\n"
    "Answer with the option's letter from the given choices directly.",
    "mmvp": "Is thing 1 open, or closed?\nA. Open\nB. Closed\n"
    "Answer with the option's letter from the given choices directly.",
    "blink": "Note: You only need to respond with A, B, C without providing any additional information.\n"
    "How many in 1?\nSelect from the following choices.\n(A) 0\n(B) 1\n(C) 2",
    "hrbench": "Question: What is the colour of thing 0?\nOptions:\nA. red 1\nB. blue 1\nC. green 1\nD. white 1\n"
    "Please select the correct answer from the options above. \n",
    "mme-realworld-lite": "What is the colour of thing 1? The choices are listed below:\n(A) red 1\n(B) blue 1\n"
    "(C) green 1\n(D) white 1\n(E) The image does not feature it.\nSelect the best answer to the above "
    "multiple-choice question based on the image. Respond with only the letter (A, B, C, D, or E) of the correct "
    "option.\nThe best answer is: ",
}  # fmt: skip
GROUPS = {
    "vstar": ["direct_attributes", "relative_position"],
    "mmvp": [""],
    "blink": ["Art_Style", "Counting"],
    "hrbench": ["4k cross", "4k single", "8k cross", "8k single"],
    "mme-realworld-lite": ["Perception/Monitoring", "Reasoning/Autonomous_Driving"],
}


def samples_of(name: str, folder: Path) -> list[Sample]:
    reader = open_published(PUBLISHED[name], str(copies.COPIES[name](folder)))
    return [reader.read(number) for number in range(len(reader))]


@pytest.mark.parametrize("name", PUBLISHED)
def test_what_is_asked(name: str, tmp_path: Path) -> None:
    samples = samples_of(name, tmp_path)
    benchmark = find_benchmark(name)
    assert samples[1].question == QUESTIONS[name]
    assert samples[1].answer == ("A" if name == "mmvp" else "B")
    assert sorted({sample.group for sample in samples}) == GROUPS[name]
    assert len({sample.id for sample in samples}) == len(samples) == (16 if name == "hrbench" else 10)
    for sample in samples:
        benchmark.check(sample)
        assert len(benchmark.options(sample)) == {"mmvp": 2, "blink": 3, "mme-realworld-lite": 5}.get(name, 4)
        right, wrong = sample.answer, "A" if sample.answer != "A" else "B"
        assert set(benchmark.judge(sample, right).values()) == {True}
        assert set(benchmark.judge(sample, wrong).values()) == {False}


def test_pictures_are_those_of_their_record(tmp_path: Path) -> None:
    """Also behind the end of a row group, and of a file."""
    of_files = samples_of("vstar", tmp_path / "files")
    embedded = open_published(PUBLISHED["vstar"], str(copies.vstar_parquet(tmp_path / "parquet")))
    assert [embedded.read(number) for number in range(10)] == of_files
    assert [sample.input_images for sample in of_files] == [(image_bytes(n, "JPEG", (60, 40)),) for n in range(10)]
    in_base64 = samples_of("mme-realworld-lite", tmp_path / "base64")
    assert [sample.input_images for sample in in_base64] == [(image_bytes(number),) for number in range(10)]
    several = {sample.id: sample for sample in samples_of("blink", tmp_path / "several")}
    assert several["val_Art_Style_2"].input_images == tuple(image_bytes(20 + place) for place in (1, 2, 3))
    assert several["val_Counting_2"].input_images == (image_bytes(21),)


def test_a_rationale_is_judged_by_what_it_concludes(tmp_path: Path) -> None:
    """Catches a rule for bare letters that alone judges a model which reasons: it takes the A of After."""
    for name in PUBLISHED:
        sample = samples_of(name, tmp_path / name)[1]
        benchmark = find_benchmark(name)
        reply = f"Zooming in, I can see: an empty box.\nThe final answer is: {sample.answer}"
        whole, final = benchmark.rules
        assert benchmark.judge(sample, reply)[final], name
        assert final == f"{whole}-final"
    assert not find_benchmark("mme-realworld-lite").judge(sample, "After a look: answer: B")[
        "mme-realworld-lite-lmms-eval-0.7.3"
    ]


def figures(name: str, verdicts: dict[str, bool], types: dict[str, str]) -> dict[str, float]:
    benchmark = find_benchmark(name)
    assert isinstance(benchmark, Published)
    lines = [
        {"id": key, "type": types.get(key, ""), "verdicts": dict.fromkeys(benchmark.rules, right)}
        for key, right in verdicts.items()
    ]
    by_rule = benchmark.reported(lines)
    assert list(by_rule) == list(benchmark.rules)
    return by_rule[benchmark.rules[0]]


def test_figures() -> None:
    pairs = {"1": True, "2": True, "3": True, "4": False, "6": True}
    assert figures("mmvp", pairs, {}) == {"pair accuracy": 0.5, "accuracy": 0.8}
    assert figures("mmvp", {"1": True}, {}) == {"accuracy": 1.0}
    tasks = {"a": True, "b": False, "c": False, "d": True}
    types = {"a": "Counting", "b": "Counting", "c": "Counting", "d": "Jigsaw"}
    assert figures("blink", tasks, types) == {"mean of tasks": (1 / 3 + 1) / 2, "over all questions": 0.5}
    sizes = {"a": "4k single", "b": "4k cross", "c": "8k single", "d": "8k cross"}
    assert figures("hrbench", tasks, sizes) == {
        "4k": 0.5, "8k": 0.5, "4k cross": 0.0, "4k single": 1.0, "8k cross": 1.0, "8k single": 0.0,
    }  # fmt: skip
    kinds = {"a": "Perception/x", "b": "Perception/y", "c": "Reasoning/x", "d": "Reasoning/x"}
    assert figures("mme-realworld-lite", tasks, kinds) == {"overall": 0.5, "Perception": 0.5, "Reasoning": 0.5}
    assert figures("vstar", tasks, {"a": "x", "b": "y", "c": "y", "d": "y"}) == {"overall": 0.5, "x": 1.0, "y": 1 / 3}
