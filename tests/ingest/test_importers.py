"""JSON Lines of both formats, and everything that can be wrong with them."""

import os
from pathlib import Path

import pytest

from ilvr_ds.data.sample import LatentStep, Sample, TextStep
from ilvr_ds.errors import UserError
from ilvr_ds.ingest.importers import Rejected, read_records
from tests.data.packing import image_bytes, png_bomb, write_jsonl

TEXT, LATENT = {"type": "text", "content": "Look."}, {"type": "latent", "helper_image": "b.png"}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    folder = tmp_path / "images"
    folder.mkdir()
    for shade, name in enumerate(("a.png", "b.png", "c.png")):
        (folder / name).write_bytes(image_bytes(shade))
    return folder


def read(root: Path, *records, format="auto") -> list[Sample | Rejected]:
    return list(read_records(write_jsonl(root.parent / "train.jsonl", list(records)), root, format))


def ilvr(**changes) -> dict:
    record = {"text_input": "Why?", "image_input": "a.png", "sequence_plan": [TEXT, LATENT]} | changes
    return {key: value for key, value in record.items() if value is not ...}


def test_ilvr_record(root):
    plan = [LATENT, TEXT, {"type": "latent", "helper_image": "c.png"}, TEXT, TEXT]
    record = ilvr(id=7, image_input=["c.png", "a.png"], sequence_plan=plan, original_final_answer="70°", seen=[1])
    (sample,) = read(root, record)
    look = TextStep("Look.")
    assert sample == Sample(
        id="7",
        question="Why?",
        steps=(LatentStep(0), look, LatentStep(1), look, look),
        input_images=(image_bytes(2), image_bytes(0)),
        helper_images=(image_bytes(1), image_bytes(2)),
        answer="70°",
        meta={"seen": "[1]"},
    )


def test_a_latent_step_may_say_which_region_it_is_about(root):
    plan = [LATENT | {"region": [1, 2, 8, 5.5]}, LATENT | {"region": None}, LATENT]
    (sample,) = read(root, ilvr(sequence_plan=plan))
    assert sample.steps == (LatentStep(0, (1, 2, 8, 5.5)), LatentStep(1), LatentStep(2))


def test_image_input_may_be_one_path_or_absent(root):
    one, none, null = read(root, ilvr(), ilvr(image_input=...), ilvr(image_input=None))
    assert one.input_images == (image_bytes(0),)
    assert none.input_images == null.input_images == ()


def test_id_is_file_and_line_where_absent_and_blank_lines_count(root):
    samples = read(root, ilvr(), b"", b"  ", ilvr(id="own"), ilvr())
    assert [sample.id for sample in samples] == ["train-1", "own", "train-5"]


@pytest.mark.parametrize(
    ("output", "images", "steps"),
    [
        ("<think>x</think><output_image><think>y</think>", "b.png", ("<think>x</think>", 0, "<think>y</think>")),
        ("x <image>\n", "b.png", ("x ", 0, "\n")),
        ("no marker", "b.png", (0, "no marker")),
        ("no marker", ["b.png", "c.png"], (0, 1, "no marker")),
        ("<output_image>x<output_image>", ["b.png", "c.png"], (0, "x", 1)),
        ("only text", ..., ("only text",)),
    ],
)
def test_mirage_helper_image_stands_at_its_marker_or_first(root, output, images, steps):
    record = {"text_input": "Why?", "text_output": output} | ({} if images is ... else {"image_output": images})
    (sample,) = read(root, record)
    assert sample.steps == tuple(TextStep(s) if isinstance(s, str) else LatentStep(s) for s in steps)
    assert len(sample.helper_images) == sum(isinstance(s, int) for s in steps)


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"is \boxed{A}.", "A"),
        (r"\boxed{A} no, \boxed{ \frac{1}{2} } end", r"\frac{1}{2}"),
        (r"\boxed{A", ""),
        ("none", ""),
    ],
)
def test_mirage_answer_is_the_last_box(root, text, answer):
    (sample,) = read(root, {"text_input": "Why?", "text_output": text, "image_output": "b.png"})
    assert sample.answer == answer


def test_question_without_outputs_is_for_evaluation_and_keeps_what_scoring_needs(root):
    (root / "level_3").mkdir()
    (root / "level_3" / "a.png").write_bytes(image_bytes())
    record = {"text_input": "Map: <image>", "image_input": "level_3/a.png", "map_id": "4", "map_desc": [[1, -1]]}
    (sample,) = read(root, record)
    assert sample.steps == ()
    assert sample.meta == {"map_id": "4", "map_desc": "[[1, -1]]"}
    assert sample.group == "level3"
    (empty_plan,) = read(root, ilvr(sequence_plan=[], original_final_answer="A"))
    assert (empty_plan.steps, empty_plan.answer) == ((), "A")


def test_group_comes_from_its_key_before_the_folders(root):
    (root / "deletion").mkdir()
    (root / "deletion" / "a.png").write_bytes(image_bytes())
    plain, key, operation = read(
        root,
        ilvr(image_input="deletion/a.png"),
        ilvr(image_input="deletion/a.png", group="mine"),
        ilvr(operation="update", type=[]),
    )
    assert (plain.group, key.group, operation.group) == ("deletion", "mine", "update")


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        (b'{"text_input": ', "not valid JSON"),
        (b"\xff\xfe\xfd", "not valid JSON"),
        (b"[" * 100_000, "not valid JSON"),
        (b"[1]", "expected a JSON object, found a list"),
        (ilvr(text_input=...), "missing key 'text_input'"),
        (ilvr(text_input=" \n"), "'text_input' is empty"),
        (ilvr(text_input=["x"]), "'text_input' is a list"),
        (ilvr(sequence_plan=...), "missing key 'sequence_plan'"),
        (ilvr(sequence_plan="x"), "'sequence_plan' is text"),
        (ilvr(sequence_plan=[TEXT, "x"]), "step 2 of the plan: it is text"),
        (ilvr(sequence_plan=[{"type": "text", "content": " "}]), "step 1 of the plan: 'content' is empty"),
        (ilvr(sequence_plan=[{"type": "latent"}]), "step 1 of the plan: missing key 'helper_image'"),
        (ilvr(sequence_plan=[TEXT | {"type": "txt"}]), "unknown type 'txt'; did you mean 'text'?"),
        (ilvr(sequence_plan=[LATENT | {"helper_image": "no.png"}]), "helper image 'no.png' is missing below"),
        (ilvr(text_input="<image> <image>"), "2 <image> markers in the question but 1 input images"),
        (
            ilvr(sequence_plan=[LATENT | {"region": "all"}]),
            "step 1 of the plan: 'region' is \"all\", expected [left",
        ),
        (
            ilvr(sequence_plan=[LATENT | {"region": [0, 0, 1, True]}]),
            "'region' is [0, 0, 1, true], expected [left",
        ),
        (
            ilvr(sequence_plan=[TEXT, LATENT | {"region": [0, 0, 9, 6]}]),
            "step 2 of the plan: region [0, 0, 9, 6] is",
        ),
        (ilvr(image_input=["a.png", 3]), "'image_input' holds a number"),
        (ilvr(image_input=""), "'image_input' holds an empty path"),
        (ilvr(image_input="no.png"), "input image 'no.png' is missing below"),
        (ilvr(image_input="."), "not a file"),
        (ilvr(image_input="a\0.png"), "no file can have this name"),
        (ilvr(image_input="\ud800.png"), "no file can have this name"),
        (ilvr(image_input="x" * 5000), "cannot be read"),
        (ilvr(original_final_answer={"a": 1}), "'original_final_answer' is an object"),
        (ilvr(id=[1]), "'id' is a list"),
        (ilvr(id=float("nan")), "'id' is nan"),
        (ilvr(original_final_answer=float("nan")), "'original_final_answer' is nan"),
        (ilvr(answer=float("-inf")), "'answer' is -inf"),
        (b'{"text_input": "x", "sequence_plan": [], "answer": 1e999}', "'answer' is inf"),
        (ilvr(image_input=..., image_inputs="a.png"), "unknown key 'image_inputs'; did you mean 'image_input'"),
        (ilvr(original_answer="A"), "unknown key 'original_answer'; did you mean 'original_final_answer'"),
    ],
)
def test_rejected_ilvr_records(root, record, reason):
    good, bad, after = read(root, ilvr(), record, ilvr(), format="ilvr")
    assert isinstance(good, Sample) and isinstance(after, Sample)
    assert (bad.line, bad.id) == (2, "train-2")
    assert reason in bad.reason
    assert "\n" not in bad.reason


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"text_output": "a<image>b<image>c"}, "2 image markers in 'text_output' but 1 in 'image_output'"),
        ({"image_output": None, "text_output": "a<output_image>"}, "1 image markers in 'text_output' but 0"),
        ({"text_output": None}, "'text_output' is null"),
        ({"text_output": ""}, "'text_output' is empty"),
        ({"image_output": "no.png"}, "helper image 'no.png' is missing"),
    ],
)
def test_rejected_mirage_records(root, changes, reason):
    (bad,) = read(root, {"text_input": "Why?", "image_output": "b.png", "text_output": "x"} | changes)
    assert reason in bad.reason


@pytest.mark.parametrize("path", ["../secret.png", "x/../../secret.png", "x/../a.png", "ABSOLUTE"])
def test_paths_may_not_leave_the_image_root(root, path):
    secret = root.parent / "secret.png"
    secret.write_bytes(image_bytes())
    (root / "x").mkdir()
    (bad,) = read(root, ilvr(image_input=path.replace("ABSOLUTE", str(secret))))
    assert "leaves the image root" in bad.reason


def test_damaged_and_hostile_images_are_rejected(root):
    (root / "bomb.png").write_bytes(png_bomb())
    (root / "big.png").write_bytes(png_bomb(10_000))  # below Pillow's own alarm, above our limit
    (root / "cut.png").write_bytes(image_bytes(size=(64, 64))[:-30])
    (root / "text.png").write_text("no image")
    (root / "image.gif").write_bytes(image_bytes(kind="GIF"))
    os.mkfifo(root / "pipe.png")  # reading it would wait for ever
    names = ["bomb.png", "big.png", "cut.png", "text.png", "image.gif", "pipe.png"]
    bad = read(root, *(ilvr(image_input=name) for name in names))
    assert [name in rejected.reason for name, rejected in zip(names, bad, strict=True)] == [True] * 6
    assert "100000000" in bad[1].reason or "10000x10000" in bad[1].reason
    assert "not a file" in bad[5].reason


def test_duplicate_ids_name_the_first_line(root):
    bad_first = ilvr(id="x", image_input="no.png")
    _, first, second = read(root, bad_first, ilvr(id="x"), ilvr(id="x"))
    assert isinstance(first, Sample), "a rejected record must not reserve its id"
    assert second == Rejected(3, "x", "the id stands already in line 2")


def test_mixed_formats_name_file_line_and_keys(root):
    with pytest.raises(UserError, match=r"train\.jsonl:3: .*image_output, text_input, text_output"):
        read(root, ilvr(), b"{broken", {"text_input": "x", "text_output": "y", "image_output": "b.png"})
    with pytest.raises(UserError, match=r"train\.jsonl:1: .*sequence_plan, text_input, text_output"):
        read(root, ilvr(text_output="y"))


def test_unknown_keys_name_file_line_and_keys(root):
    with pytest.raises(UserError, match=r"train\.jsonl:2: .*keys: image, question"):
        read(root, b"", {"question": "x", "image": "a.png"})


def test_explicit_format_overrides_the_keys(root):
    (bad,) = read(root, {"text_input": "x", "text_output": "y"}, format="ilvr")
    assert "missing key 'sequence_plan'" in bad.reason


def test_missing_input_and_root_and_misspelt_format(root):
    with pytest.raises(UserError, match=r"none.jsonl: cannot read the records"):
        list(read_records(root / "none.jsonl", root, "auto"))
    with pytest.raises(UserError, match=r"nowhere: the image root is not a folder"):
        list(read_records(root / "a.png", root / "nowhere", "auto"))
    with pytest.raises(UserError, match=r"did you mean 'mirage'"):
        read(root, ilvr(), format="mirrage")


def test_half_a_surrogate_pair_is_rejected(tmp_path: Path) -> None:
    """JSON may hold one; a tokenizer ends the whole packing with a TypeError."""
    source = write_jsonl(tmp_path / "a.jsonl", [b'{"text_input": "a \\ud800 b"}', b'{"text_input": "a"}'])
    first, second = read_records(source, tmp_path, "mirage")
    assert first.reason.startswith("the text is not valid Unicode") and isinstance(second, Sample)


def test_a_key_that_stands_twice_is_rejected(tmp_path: Path) -> None:
    """JSON readers take the last and say nothing."""
    source = write_jsonl(tmp_path / "a.jsonl", [b'{"text_input": "a", "answer": "A", "answer": "B"}'])
    [rejected] = read_records(source, tmp_path, "mirage")
    assert rejected.reason == "the key 'answer' stands there twice"


def test_an_absolute_path_inside_the_image_root_is_read(root, tmp_path):
    """Also where the root is given relative or as a link."""
    (root / "level_3").mkdir()
    (root / "level_3" / "a.png").write_bytes(image_bytes())
    (tmp_path / "link").symlink_to(root)
    for given in (root, tmp_path / "link"):
        for path in (root / "level_3/a.png", given / "level_3/a.png"):
            record = ilvr(image_input=str(path), sequence_plan=[LATENT | {"helper_image": str(root / "b.png")}])
            [sample] = read_records(write_jsonl(tmp_path / "train.jsonl", [record]), given)
            assert isinstance(sample, Sample), sample
            assert (sample.input_images, sample.helper_images) == ((image_bytes(),), (image_bytes(1),))
            assert sample.group == "level3"


def test_folders_above_the_image_root_name_no_group(tmp_path):
    root = tmp_path / "deletion" / "images"
    root.mkdir(parents=True)
    (root / "a.png").write_bytes(image_bytes())
    record = ilvr(image_input=str(root / "a.png"), sequence_plan=[TEXT])
    [sample] = read_records(write_jsonl(tmp_path / "a.jsonl", [record]), root)
    assert sample.group == ""
