"""CoMT's original records, written after the README of its repository."""

from __future__ import annotations

from base64 import b64encode
from pathlib import Path

import pyarrow
import pytest
from pyarrow import parquet

from ilvr_ds.data.sample import Sample
from ilvr_ds.evaluation.scoring import comt_official, read_options
from ilvr_ds.ingest.containers.opening import open_source
from ilvr_ds.ingest.importers import Importer
from tests.data.packing import image_bytes
from tests.ingest.records import read, read_twenty, shapes

TYPES = ("creation", "deletion", "update", "selection")
FINAL = "\nThe final answer is: (B)"


@pytest.fixture
def comt(tmp_path: Path) -> Path:
    """The folder `comt` of the README: images by type, some of each ending."""
    root = tmp_path / "comt"
    for n, kind in enumerate(TYPES):
        (root / "images" / kind).mkdir(parents=True)
        for m, ending in enumerate((".png", ".jpg", ".png")):
            (root / "images" / kind / f"{n}000{m}{ending}").write_bytes(
                image_bytes(10 * n + m, {".jpg": "JPEG"}.get(ending, "PNG"))
            )
    return root


def record(n: int, **changes) -> dict:
    kind = TYPES[n % 4]
    made = {
        "id": f"{kind}-{n}",
        "question": f"How many people are left in picture {n}?",
        "option": ["3", "13", "5", "15"],
        "image": {"IMAGE0": f"{n % 4}0000", "IMAGE1": f"{n % 4}0001"},
        "rationale": "First remove the man. [IMAGE1] Then count.",
        "answer": "B",
        "type": kind,
        "annotations": [[1, 2, 3, 4]],
    } | changes
    return {key: value for key, value in made.items() if value is not ...}


def test_twenty_records(comt):
    good = [record(n) for n in range(15)]
    broken = [
        (record(20, answer="E"), "the answer 'E' is none of the options A, B, C, D"),
        (record(21, image={"IMAGE0": "10000", "IMAGE1": "99999"}), "'images/deletion/99999.png' is missing below"),
        (record(22, rationale="Look: [IMAGE2]"), "IMAGE2 is named in the text but is not in 'image'"),
        (record(23, rationale="No picture."), "IMAGE1 is named neither in the question nor in the rationale"),
        (record(24, option=[]), "'option' is an empty list"),
        (record(25, question=" "), "'question' is empty"),
        (record(27, option=["3", None, "5"]), "an option is empty"),
        (record(28, option=["3", {"a": 1}]), "'option' is an object, expected text or a number"),
        (record(29, image=["IMAGE0:10000", "IMAGE1:10001", "IMAGE1:10002"]), "'image' gives two images one number"),
        (record(30, question="In IMAGE1?", rationale="None."), "IMAGE0 is named neither in the question nor in the"),
        (record(31, question="In IMAGE1?", rationale=...), "IMAGE0 is named neither in the question nor in the"),
        (record(32, image={"IMAGE0": "10000", "first": {"bytes": "eA=="}}), "'image' holds 'first', expected IMAGE0"),
        (record(26, image=["nothing"]), "'image' names no IMAGE0, IMAGE1, ... with an id"),
    ]
    samples = read_twenty(comt, good, broken)
    assert len(samples) == 15
    for n, sample in enumerate(samples):
        assert sample.question == f"How many people are left in picture {n}?\n(A) 3\n(B) 13\n(C) 5\n(D) 15"
        assert shapes(sample) == ["First remove the man. ", 0, " Then count.", FINAL]
        assert sample.input_images == (image_bytes(10 * (n % 4)),)
        assert sample.helper_images == (image_bytes(10 * (n % 4) + 1, "JPEG"),)
        assert (sample.answer, sample.group) == ("B", TYPES[n % 4])
        assert sample.meta["annotations"] == "[[1, 2, 3, 4]]"


@pytest.mark.parametrize(
    "image",
    [
        ["IMAGE0:00000", "IMAGE1:00001"],
        ["[IMAGE0:00000]", "[IMAGE1:00001]"],
        [{"IMAGE0": "00000"}, {"IMAGE1": "00001"}],
        "{'IMAGE0': '00000', 'IMAGE1': '00001'}",
        {"IMAGE0": "00000.png", "IMAGE1": "00001.jpg"},
    ],
)
def test_the_images_may_be_written_in_several_ways(comt, image):
    (sample,) = read(comt, record(0, image=image))
    assert (sample.input_images, sample.helper_images) == ((image_bytes(0),), (image_bytes(1, "JPEG"),))


@pytest.mark.parametrize("name", ["[IMAGE1]", "<IMAGE1>", "IMAGE1", "[IMAGE1:00001]"])
def test_an_image_is_a_helper_where_the_rationale_names_it(comt, name):
    (sample,) = read(comt, record(0, rationale=f"a {name} b"))
    assert shapes(sample) == ["a ", 0, " b", FINAL]


def test_the_words_around_a_name_stay(comt):
    """Catches a word that is taken for the image's id, and a bracket that closes more than the name."""
    (sample,) = read(comt, record(0, rationale="IMAGE1:we see (as IMAGE1) that (IMAGE1) is"))
    assert shapes(sample) == [0, ":we see (as ", 1, ") that ", 2, " is", FINAL]


def test_inputs_are_what_the_question_names_or_the_first_image(comt):
    created = record(0, image={"IMAGE0": "00000"}, rationale="Draw it. [IMAGE0] Done.")
    two = record(0, id="two", question="[IMAGE0] or [IMAGE2]?", image={f"IMAGE{m}": f"0000{m}" for m in range(3)})
    made, compared = read(comt, created, two)
    assert (made.input_images, made.helper_images) == ((), (image_bytes(0),))
    assert compared.question.startswith("<image> or <image>?\n(A)")
    assert compared.input_images == (image_bytes(0), image_bytes(2))


def test_the_judges_find_options_and_answer_in_what_is_made_of_a_record(comt):
    """Options stand in the question as evaluation reads them, and the plan's end is the answer to CoMT's rules."""
    (sample,) = read(comt, record(0))
    options = read_options(sample.question)
    assert options == ["3", "13", "5", "15"]
    assert comt_official(FINAL, "B", options)


def test_a_record_without_a_rationale_shows_no_helper_and_is_for_evaluation(comt):
    (sample,) = read(comt, record(0, rationale=None))
    assert isinstance(sample, Sample)
    assert (sample.steps, sample.input_images, sample.answer) == ((), (image_bytes(0),), "B")


@pytest.mark.parametrize(("answer", "letter"), [(1, "B"), ("(c)", "C"), ("d", "D")])
def test_the_answer_is_a_letter_or_counts_from_0(comt, answer, letter):
    (sample,) = read(comt, record(0, answer=answer))
    assert sample.answer == letter


def test_images_that_the_record_holds_itself(comt, tmp_path):
    """As bytes in a table, where every row has every key, and in base64."""
    held = {"IMAGE0": {"bytes": image_bytes(7), "path": "x.png"}, "IMAGE1": {"bytes": image_bytes(8)}, "IMAGE2": None}
    parquet.write_table(pyarrow.Table.from_pylist([record(0, image=held)]), tmp_path / "a.parquet")
    ((_, table),) = Importer(open_source(tmp_path / "a.parquet"), comt)
    (lines,) = read(comt, record(0, image={"IMAGE0": b64encode(image_bytes(7)).decode(), "IMAGE1": "00001"}))
    assert (table.input_images, table.helper_images) == ((image_bytes(7),), (image_bytes(8),))
    assert (lines.input_images, lines.helper_images) == ((image_bytes(7),), (image_bytes(1, "JPEG"),))


def test_a_name_with_its_id_is_left_out_whole(comt):
    (sample,) = read(comt, record(0, rationale="Look {IMAGE1: 00001} here."))
    assert shapes(sample)[:-1] == ["Look ", 0, " here."]
