"""The published benchmarks, each with the prompt and the rule of one place, so that a score is that place's score."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Sequence

from ilvr_ds.data.sample import Sample, SampleError
from ilvr_ds.evaluation.published import letters
from ilvr_ds.evaluation.published.benchmark import FINAL, Published, asked, share, shares_by_type
from ilvr_ds.evaluation.published.rows import Row, picture
from ilvr_ds.evaluation.results import Line
from ilvr_ds.evaluation.scoring import LETTERS, read_options

_LMMS_EVAL = "https://github.com/EvolvingLMMs-Lab/lmms-eval/tree/v0.7.3/lmms_eval/tasks"
_VLMEVALKIT = "https://github.com/open-compass/VLMEvalKit/blob/main/vlmeval"
_LETTER_DIRECTLY = "Answer with the option's letter from the given choices directly."
_MME_ASK = (
    "Select the best answer to the above multiple-choice question based on the image. Respond with only the letter "
    "(A, B, C, D, or E) of the correct option.\nThe best answer is: "
)
_BLINK_PICTURES = ("image_1", "image_2", "image_3", "image_4")


def _letter(row: Row, *columns: str) -> str:
    """An answer's letter, as `B`, `(b)` or `(B)`."""
    return row.text(*columns).strip("() ").upper()


def _vstar(row: Row) -> Sample:
    """The authors' text, which lists the options and asks for a letter."""
    text = row.text("text")
    options = [option.split("\n")[0].strip() for option in read_options(text)]
    group = row.text("category")
    name = f"{group}-{row.text('question_id')}"
    return asked(name, text, [picture(row, "image")], options, _letter(row, "label"), group)


def _mmvp(row: Row) -> Sample:
    """Question, options as A. and B., and the wish for a letter; the picture's number is the record's."""
    number = int(row.text("Index", "index", "lndex"))
    listed = row.text("Options", "options")
    options = [part.strip() for part in re.split(r"\(\w\)", listed)[1:]]
    question = row.text("Question", "question")
    lines = [question, *(f"{LETTERS[place]}. {option}" for place, option in enumerate(options)), _LETTER_DIRECTLY]
    answer = _letter(row, "Correct Answer", "answer")
    if row.file.suffix == ".csv":
        row = row._replace(values={"image": f"MMVP Images/{number}.jpg"})
    return asked(str(number), "\n".join(lines), [picture(row, "image")], options, answer, "")


def _blink(row: Row) -> Sample:
    """The authors' prompt after lmms-eval's wish for a letter."""
    options = [str(choice) for choice in row.values.get("choices") or []]
    wish = f"Note: You only need to respond with {', '.join(LETTERS[: len(options)])} without providing any "
    question = f"{wish}additional information.\n{row.text('prompt')}"
    pictures = [picture(row, column) for column in _BLINK_PICTURES]
    return asked(row.text("idx"), question, pictures, options, _letter(row, "answer"), row.text("sub_task"))


def _hrbench(row: Row) -> Sample:
    """VLMEvalKit's prompt for multiple choice. A question comes four times, with its options in another order."""
    options = [str(row.values[letter]) for letter in "ABCD" if row.values.get(letter) is not None]
    listed = "".join(f"{letter}. {option}\n" for letter, option in zip("ABCD", options, strict=False))
    question = f"Question: {row.text('question')}\nOptions:\n{listed}"
    question += "Please select the correct answer from the options above. \n"
    size = "8k" if "8k" in row.file.name else "4k"
    name = f"{size}-{row.text('index')}"
    return asked(
        name, question, [picture(row, "image")], options, _letter(row, "answer"), f"{size} {row.text('category')}"
    )


def _mme_realworld(row: Row) -> Sample:
    """The authors' prompt."""
    listed = row.values.get("multi-choice options")
    if not isinstance(listed, list):
        raise SampleError("no list 'multi-choice options'")
    options = [re.sub(r"^\s*\([A-E]\)\s*", "", option) for option in listed]
    choices = "\n".join(listed)
    question = f"{row.text('question')} The choices are listed below:\n{choices}\n{_MME_ASK}"
    return asked(
        row.text("index"), question, [picture(row, "bytes")], options, _letter(row, "answer"), row.text("category")
    )


def _overall_and_types(lines: Sequence[Line], rule: str) -> dict[str, float]:
    return {"overall": share(lines, rule), **shares_by_type(lines, rule)}


def _pairs(lines: Sequence[Line], rule: str) -> dict[str, float]:
    """A pair is right if both its questions are; those that are not whole are left out."""
    pairs = defaultdict(list)
    for line in lines:
        pairs[(int(line["id"]) - 1) // 2].append(line["verdicts"][rule])
    whole = [all(verdicts) for verdicts in pairs.values() if len(verdicts) == 2]
    accuracy = {"accuracy": share(lines, rule)}
    return ({"pair accuracy": sum(whole) / len(whole)} if whole else {}) | accuracy


def _mean_of_types(lines: Sequence[Line], rule: str) -> dict[str, float]:
    """The authors' total is the mean of the tasks' accuracies, lmms-eval's the accuracy over all questions."""
    types = shares_by_type(lines, rule)
    return {"mean of tasks": sum(types.values()) / len(types), "over all questions": share(lines, rule)}


def _by_size(lines: Sequence[Line], rule: str) -> dict[str, float]:
    sizes = sorted({line["type"].split()[0] for line in lines})
    overall = {size: share([line for line in lines if line["type"].startswith(size)], rule) for size in sizes}
    return overall | shares_by_type(lines, rule)


def _by_task(lines: Sequence[Line], rule: str) -> dict[str, float]:
    tasks = sorted({line["type"].split("/")[0] for line in lines})
    found = {task: share([line for line in lines if line["type"].startswith(task)], rule) for task in tasks}
    return {"overall": share(lines, rule), **found}


def _rules(name: str, by: str) -> tuple[str, str]:
    return f"{name}-{by}", f"{name}-{by}{FINAL}"


VSTAR = Published(
    name="vstar",
    rules=_rules("vstar", "lmms-eval-0.7.3"),
    hub="craigwu/vstar_bench",
    layouts=("test_questions.jsonl", "**/test-*.parquet"),
    pictures=frozenset({"image"}),
    sample=_vstar,
    letter=letters.vstar,
    figures=_overall_and_types,
    reference=f"{_LMMS_EVAL}/vstar_bench",
)
MMVP = Published(
    name="mmvp",
    rules=_rules("mmvp", "lmms-eval-0.7.3"),
    hub="MMVP/MMVP",
    layouts=("Questions.csv", "**/train-*.parquet", "**/test-*.parquet"),
    pictures=frozenset({"image"}),
    sample=_mmvp,
    letter=letters.mmvp,
    figures=_pairs,
    reference=f"{_LMMS_EVAL}/mmvp",
)
BLINK = Published(
    name="blink",
    rules=_rules("blink", "lmms-eval-0.7.3"),
    hub="BLINK-Benchmark/BLINK",
    layouts=("*/val-*.parquet",),
    pictures=frozenset(_BLINK_PICTURES),
    sample=_blink,
    letter=letters.blink,
    figures=_mean_of_types,
    reference=f"{_LMMS_EVAL}/blink",
)
HRBENCH = Published(
    name="hrbench",
    rules=_rules("hrbench", "vlmevalkit-2026-08"),
    hub="DreamMr/HR-Bench",
    layouts=("hr_bench_[48]k.parquet",),
    pictures=frozenset({"image"}),
    sample=_hrbench,
    letter=letters.exact_matching,
    figures=_by_size,
    reference=f"{_VLMEVALKIT}/dataset/image_mcq.py",
)
MME_REALWORLD_LITE = Published(
    name="mme-realworld-lite",
    rules=_rules("mme-realworld-lite", "lmms-eval-0.7.3"),
    hub="yifanzhang114/MME-RealWorld-lite-lmms-eval",
    layouts=("**/train-*.parquet",),
    pictures=frozenset({"bytes"}),
    sample=_mme_realworld,
    letter=letters.mme_realworld,
    figures=_by_task,
    reference=f"{_LMMS_EVAL}/mme_realworld",
)
PUBLISHED = {benchmark.name: benchmark for benchmark in (VSTAR, MMVP, BLINK, HRBENCH, MME_REALWORLD_LITE)}
