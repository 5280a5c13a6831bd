from __future__ import annotations

import math
import re
from collections import Counter, defaultdict
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from ilvr_ds.data.check import check_sample
from ilvr_ds.data.sample import LatentStep, TextStep
from ilvr_ds.demo.task import OPERATIONS, TaskSpec, draw_sample, draw_samples, write_task, writing
from ilvr_ds.demo.task.creation import Creation
from ilvr_ds.demo.task.deletion import Deletion
from ilvr_ds.demo.task.drawing import encode_scene
from ilvr_ds.demo.task.generate import split_of
from ilvr_ds.demo.task.scene import Figure, Scene
from ilvr_ds.demo.task.selection import Selection
from ilvr_ds.demo.task.spec import COLOURS, SHAPES
from ilvr_ds.demo.task.update import Update
from ilvr_ds.errors import UserError
from ilvr_ds.ingest.importers import Rejected
from tests.demo.demo_reader import CELL, read_picture, read_pixels, solve
from tests.demo.test_look import LOOKS
from tests.demo.text_alone import (
    assert_the_total_tells_nothing,
    naive_bayes_score,
    text_and_picture_features,
    text_features,
    words_before_answer,
)
from tests.ingest.records import read_records

SPECS = [
    TaskSpec(),
    TaskSpec(shapes=3, colours=5, shuffled_options=False),
    TaskSpec(grid=6, shapes=8, colours=8),
    TaskSpec(grid=8),
]
TRAILS = [TaskSpec(operations=("trail",)), TaskSpec(grid=6, shapes=6, colours=6, operations=("trail",), signs=9)]
SHADED = TaskSpec(operations=OPERATIONS, shaded=True, shuffled_options=False)
OPERATION_CLASSES = (Creation, Deletion, Update, Selection)


@pytest.mark.parametrize(
    "spec",
    [*SPECS, *TRAILS, *LOOKS, SHADED],
    ids=lambda spec: f"{spec.grid}-{spec.operations[-1]}-{spec.colours}-{'shaded' if spec.shaded else 'plain'}",
)
def test_the_answer_and_the_helper_pictures_follow_from_the_pixels_and_the_question(spec: TaskSpec) -> None:
    for split in ("train", "held_out"):
        for sample in draw_samples(spec, 5, split, 100):
            letter, helpers = solve(sample.question, read_picture(sample.input_images[0]))
            assert letter == sample.answer, sample.id
            assert helpers == [read_picture(png) for png in sample.helper_images], sample.id


def test_samples_are_whole() -> None:
    for index, sample in enumerate(draw_samples(TaskSpec(), 1, "train", 40)):
        check_sample(sample)
        assert sample.group == OPERATIONS[index % 4]
        option = re.search(rf"{sample.answer}\) (.+?)( [B-D]\)|$)", sample.question)[1]
        assert sample.steps[-1] == TextStep(f"The final answer is: {sample.answer}) {option}")
        assert [type(step) for step in sample.steps] == [TextStep, LatentStep] * 2 + [TextStep]


def test_harder_tasks_take_more_steps() -> None:
    for grid in (4, 6, 8):
        samples = {sample.group: sample for sample in draw_samples(TaskSpec(grid=grid), 1, "train", 4)}
        steps = {group: len(sample.helper_images) for group, sample in samples.items()}
        assert steps == {"creation": grid // 2, "deletion": grid // 2, "update": grid // 2, "selection": 2}


@pytest.mark.parametrize("operation", OPERATION_CLASSES)
def test_every_text_can_have_every_answer(operation: type) -> None:
    rng = np.random.default_rng(0)
    for _ in range(20):
        words = operation.draw(rng, TaskSpec())
        for right in range(4):
            given = words.scenes(rng, right)[0]
            assert solve(words.question, read_picture(encode_scene(given)))[0] == "ABCD"[right]


def test_what_the_rationale_tells_is_seen_in_the_pictures() -> None:
    for sample in draw_samples(TaskSpec(), 8, "train", 200):
        pictures = [read_picture(png).cells for png in (*sample.input_images, *sample.helper_images)]
        texts = [step.content for step in sample.steps if isinstance(step, TextStep)]
        if sample.group == "deletion":
            for text, before, after in zip(texts, pictures, pictures[1:], strict=False):
                gone = [before[place] for place in sorted(before) if place not in after]
                assert text.endswith(f"first the {gone[0]}.")
        if sample.group == "update":
            name, row, column = re.match(r"The (.+) is in row (\d), column (\d)\.", texts[0]).groups()
            assert pictures[0][int(row) - 1, int(column) - 1] == name
        if sample.group == "selection":
            shape = re.search(r"Find the (\w+)\.", texts[1])[1]
            beside = [pictures[1][place] for place in sorted(pictures[1]) if not pictures[1][place].endswith(shape)]
            assert texts[1].startswith(f"Beside the {shape}: {', '.join(beside) or 'nothing'}.")


@pytest.mark.parametrize("split", ["train", "held_out"])
def test_letters_are_balanced_in_every_operation(split: str) -> None:
    counts = defaultdict(Counter)
    for sample in draw_samples(TaskSpec(), 2, split, 1600):
        counts[sample.group][sample.answer] += 1
    assert set(counts) == set(OPERATIONS)
    for group, letters in counts.items():
        assert sum(letters.values()) == 400
        chi_square = sum((letters[letter] - 100) ** 2 / 100 for letter in "ABCD")
        assert chi_square < 16.3, group  # 3 degrees of freedom, one in a thousand


def test_a_number_of_shapes_in_the_picture_does_not_tell_the_number_that_remains() -> None:
    assert_the_total_tells_nothing(draw_samples(TaskSpec(operations=("deletion",)), 3, "train", 600))


def test_the_candidates_of_creation_are_alike_without_the_words() -> None:
    spec = TaskSpec(operations=("creation",))
    for sample in draw_samples(spec, 3, "train", 200):
        cells = read_picture(sample.input_images[0]).cells
        quarters = [
            {(r % 2, c % 2, name) for (r, c), name in cells.items() if (r // 2, c // 2) == corner}
            for corner in ((0, 0), (0, 1), (1, 0), (1, 1))
        ]
        distances = [sorted(len(one ^ other) for other in quarters) for one in quarters]
        assert all(row == distances[0] for row in distances), "the odd one out could be told from its looks"


def test_options_can_stand_in_a_fixed_order() -> None:
    order = {"selection": COLOURS, "creation": ("top left", "top right", "bottom left", "bottom right")}
    letters = Counter()
    for sample in draw_samples(TaskSpec(shuffled_options=False), 3, "train", 400):
        options = re.findall(r"[A-D]\) (.+?)(?= [B-D]\)|$)", sample.question)
        if sample.group in order:
            assert options == sorted(options, key=order[sample.group].index)
        if sample.group == "deletion":
            assert options == sorted(options, key=int)
        letters[sample.answer] += 1
    assert min(letters.values()) > 70, "whichever option is right, letters stay balanced"


def test_every_other_quarter_of_selection_holds_a_wrong_option() -> None:
    for sample in draw_samples(TaskSpec(operations=("selection",)), 3, "train", 100):
        shape = re.search(r"is the (\w+) there", sample.question)[1]
        cells = read_picture(sample.input_images[0]).cells
        shown = {(r // 2, c // 2): name.split()[0] for (r, c), name in cells.items() if name.endswith(shape)}
        assert sorted(shown.values()) == sorted(re.findall(r"[A-D]\) (\w+)", sample.question))


def test_a_sample_does_not_depend_on_the_order_of_calls() -> None:
    spec = TaskSpec()
    forward = list(draw_samples(spec, 7, "train", 12))
    assert [draw_sample(spec, 7, index, "train") for index in reversed(range(12))] == forward[::-1]
    assert list(draw_samples(spec, 7, "train", 5, start=7)) == forward[7:]
    others = [draw_sample(spec, 8, 0, "train"), draw_sample(spec, 7, 0, "held_out"), draw_sample(spec, 7, 4, "train")]
    assert all(words_before_answer(other) != words_before_answer(forward[0]) for other in others)


@pytest.mark.parametrize("split", ["train", "held_out"])
def test_the_content_of_a_sample_says_its_split(split: str) -> None:
    for sample in draw_samples(TaskSpec(), 4, split, 200):
        given = read_picture(sample.input_images[0])
        figures = {place: Figure(*name.split()) for place, name in given.cells.items()}
        scene = Scene(given.side, given.side, dict(reversed(figures.items())))
        assert split_of(SimpleNamespace(question=sample.question), scene) == split


def test_equal_cells_have_equal_pixels_wherever_they_stand() -> None:
    seen: dict[str, bytes] = {}
    for sample in draw_samples(TaskSpec(), 6, "train", 60):
        for png in (*sample.input_images, *sample.helper_images):
            pixels, picture = read_pixels(png), read_picture(png)
            assert pixels.shape[0] >= 56
            for row, column in np.ndindex(picture.side, picture.side):
                cell = pixels[row * CELL : (row + 1) * CELL, column * CELL : (column + 1) * CELL]
                content = f"{picture.cells.get((row, column))} {picture.marked == (row, column)}"
                assert seen.setdefault(content, cell.tobytes()) == cell.tobytes(), content
    assert len(set(seen.values())) == len(seen) > 20


def test_every_shape_in_every_colour_can_be_told() -> None:
    figures = {(r, c): Figure(colour, shape) for r, colour in enumerate(COLOURS) for c, shape in enumerate(SHAPES)}
    for marked in (None, (2, 3)):
        picture = read_picture(encode_scene(Scene(8, 8, figures, marked)))
        assert picture.cells == {place: str(figure) for place, figure in figures.items()}
        assert picture.marked == marked


# --- text alone is worth nothing ---


@pytest.mark.parametrize("shuffled", [True, False])
def test_text_alone_is_no_better_than_chance(shuffled: bool) -> None:
    spec = TaskSpec(shuffled_options=shuffled)
    train, test = (list(draw_samples(spec, 9, *which)) for which in (("train", 4000), ("held_out", 2000)))
    bound = 0.25 + 3.3 * math.sqrt(0.25 * 0.75 / len(test))  # one in two thousand
    assert naive_bayes_score(train, test, text_features) < bound


def test_the_same_learner_finds_what_is_there_to_find() -> None:
    spec = TaskSpec(operations=("deletion", "selection"))
    train, test = (list(draw_samples(spec, 9, *which)) for which in (("train", 1000), ("held_out", 400)))
    assert naive_bayes_score(train, test, text_and_picture_features) > 0.5
    leaky = [replace(sample, question=f"{sample.question} {sample.answer.lower()}") for sample in test]
    leaky_train = [replace(sample, question=f"{sample.question} {sample.answer.lower()}") for sample in train]
    assert naive_bayes_score(leaky_train, leaky, text_features) > 0.9


# --- trails ---


@pytest.mark.parametrize("spec", TRAILS, ids=["4", "6"])
def test_signs_lead_through_every_cell_before_they_come_back(spec: TaskSpec) -> None:
    for sample in draw_samples(spec, 3, "train", 40):
        given = read_picture(sample.input_images[0])
        assert len(set(given.cells.values())) == spec.grid**2
        place, seen = given.marked, set()
        while place not in seen:
            seen.add(place)
            colour, shape = given.cells[place].split()
            place = spec.shape_names.index(shape), spec.colour_names.index(colour)
        assert len(seen) == spec.grid**2 and place == given.marked


def test_trails_are_balanced_and_their_words_say_nothing() -> None:
    """Each start, each last colour, each letter as often as the others; the text is the same for all."""
    samples = list(draw_samples(TRAILS[0], 4, "train", 640))
    starts = Counter(read_picture(sample.input_images[0]).marked for sample in samples)
    letters, ends = Counter(s.answer for s in samples), Counter(s.steps[-1].content.split()[-1] for s in samples)
    assert len(starts) == 16 and min(starts.values()) > 20 and max(starts.values()) < 65
    assert min(letters.values()) > 120 and min(ends.values()) > 120
    assert {tuple(s.content for s in sample.steps[:-1] if isinstance(s, TextStep)) for sample in samples} == {
        ("Follow the sign.",) * 6
    }


def test_the_text_of_a_trail_is_no_better_than_chance_unless_it_names_what_it_sees() -> None:
    plain, named = (TaskSpec(operations=("trail",), shuffled_options=False, named=named) for named in (False, True))
    bound = 0.25 + 3.3 * math.sqrt(0.25 * 0.75 / 300)
    for spec, is_told in ((plain, False), (named, True)):
        train, test = (list(draw_samples(spec, 9, *which)) for which in (("train", 600), ("held_out", 300)))
        score = naive_bayes_score(train, test, text_features)
        assert score > 0.9 if is_told else score < bound


def test_a_trails_latent_steps_are_about_the_marked_cell() -> None:
    for sample in draw_samples(TRAILS[1], 6, "train", 10):
        boxes = [step.region for step in sample.steps if isinstance(step, LatentStep)]
        for box, png in zip(boxes, sample.helper_images, strict=True):
            row, column = read_picture(png).marked
            assert box == (28 * column, 28 * row, 28 * column + 28, 28 * row + 28)


def test_cells_are_told_apart_by_their_place() -> None:
    """The same figure, unmarked, in another cell has other pixels."""
    seen: dict[bytes, tuple[int, int]] = {}
    for sample in draw_samples(TRAILS[0], 5, "train", 200):
        pixels, picture = read_pixels(sample.input_images[0]), read_picture(sample.input_images[0])
        for row, column in picture.cells:
            cell = pixels[row * CELL : (row + 1) * CELL, column * CELL : (column + 1) * CELL]
            if picture.marked != (row, column):
                assert seen.setdefault(cell.tobytes(), (row, column)) == (row, column)
    assert len(seen) == 16 * 15  # no sign points to its own cell


# --- shades ---


def test_a_shaded_piece_of_a_picture_is_the_same_pixels() -> None:
    corners = {"top left": (0, 0), "top right": (0, 2), "bottom left": (2, 0), "bottom right": (2, 2)}
    for sample in draw_samples(replace(SHADED, operations=("selection",)), 6, "train", 12):
        row, column = corners[re.match(r"Zoom in on the (\w+ \w+) quarter", sample.question)[1]]
        given, zoomed = read_pixels(sample.input_images[0]), read_pixels(sample.helper_images[0])
        cut = given[row * CELL : (row + 2) * CELL, column * CELL : (column + 2) * CELL]
        assert (zoomed == cut).all() and not np.all(zoomed == zoomed[0, 0])


def test_only_the_steps_of_a_trail_have_regions() -> None:
    for sample in draw_samples(SHADED, 6, "train", 40):
        assert all(step.region is None for step in sample.steps if isinstance(step, LatentStep))


# --- files ---


def test_a_written_task_reads_back_as_it_was_drawn(tmp_path) -> None:
    spec = TaskSpec(operations=(*OPERATIONS, "look"))
    write_task(tmp_path / "task", spec, 3, train=19, held_out=35)
    for split, count in (("train", 19), ("held_out", 35)):
        samples = list(read_records(tmp_path / "task" / f"{split}.jsonl", tmp_path / "task"))
        assert not any(isinstance(sample, Rejected) for sample in samples)
        assert samples == list(draw_samples(spec, 3, split, count))


def test_the_number_of_workers_does_not_change_a_file(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(writing, "_CHUNK", 4)
    for workers in (1, 2):
        write_task(tmp_path / str(workers), TaskSpec(), 3, train=9, held_out=2, workers=workers)
    files = [{p.relative_to(root): p.read_bytes() for p in root.rglob("*.*")} for root in sorted(tmp_path.iterdir())]
    assert files[0] == files[1] and len(files[0]) == 2 + 11 * 3


def test_a_half_written_task_leaves_nothing_behind(tmp_path, monkeypatch) -> None:
    def full_disk(*_: object) -> str:
        raise OSError("No space left on device")

    monkeypatch.setattr(writing, "_write_samples", full_disk)
    with pytest.raises(OSError, match="No space"):
        write_task(tmp_path / "task", TaskSpec(), 0, train=3, held_out=1)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_exists_is_not_overwritten(tmp_path) -> None:
    with pytest.raises(UserError, match="exists already"):
        write_task(tmp_path, TaskSpec(), 0, train=1, held_out=1)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"grid": 5}, "grid: 5"),
        ({"shapes": 9}, "shapes: 9"),
        ({"colours": 3}, "colours: 3"),
        ({"operations": ("deletoin",)}, "did you mean 'deletion'"),
        ({"operations": ("update", "update")}, "named twice"),
        ({"operations": ()}, "none given"),
        ({"operations": ("trial",)}, "did you mean 'trail'"),
        ({"operations": ("looks",)}, "did you mean 'look'"),
        ({"operations": ("trail",), "grid": 6}, "all three must be the same"),
        ({"operations": ("trail",), "signs": 15}, "signs: 15; choose 1 to 14"),
    ],
)
def test_impossible_tasks_are_refused(settings: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        TaskSpec(**settings)


def test_unknown_splits_and_negative_seeds_are_refused() -> None:
    with pytest.raises(UserError, match="did you mean 'held_out'"):
        draw_sample(TaskSpec(), 0, 0, "heldout")
    with pytest.raises(UserError, match="seed: -1"):
        draw_sample(TaskSpec(), -1, 0, "train")
