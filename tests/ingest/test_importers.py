"""What all formats have in common: ids, groups, and how a format is chosen."""

from pathlib import Path

import pytest

from ilvr_ds.data.sample import Sample
from ilvr_ds.errors import UserError
from ilvr_ds.ingest.importers import Rejected
from tests.data.packing import image_bytes, write_jsonl
from tests.ingest.records import TEXT, ilvr, read, read_records


def test_image_input_may_be_one_path_or_absent(root):
    one, none, null = read(root, ilvr(), ilvr(image_input=...), ilvr(image_input=None))
    assert one.input_images == (image_bytes(0),)
    assert none.input_images == null.input_images == ()


def test_id_is_file_and_line_where_absent_and_blank_lines_count(root):
    samples = read(root, ilvr(), b"", b"  ", ilvr(id="own"), ilvr())
    assert [sample.id for sample in samples] == ["train-1", "own", "train-5"]


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
    number, several = read(root, ilvr(group=3), ilvr(group=["a", "b"]))
    assert number.group == "3", "it would be lost"
    assert several.reason == "'group' is a list, expected text or a number"


def test_duplicate_ids_name_the_first_line(root):
    bad_first = ilvr(id="x", image_input="no.png")
    _, first, second = read(root, bad_first, ilvr(id="x"), ilvr(id="x"))
    assert isinstance(first, Sample), "a rejected record must not reserve its id"
    assert second == Rejected(3, "x", "the id already stands in line 2")


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


def test_folders_above_the_image_root_name_no_group(tmp_path):
    root = tmp_path / "deletion" / "images"
    root.mkdir(parents=True)
    (root / "a.png").write_bytes(image_bytes())
    record = ilvr(image_input=str(root / "a.png"), sequence_plan=[TEXT])
    [sample] = read_records(write_jsonl(tmp_path / "a.jsonl", [record]), root)
    assert sample.group == ""


def test_two_answers_that_differ_are_not_taken_for_one(root):
    """In the authors' format nothing says which is right; elsewhere the second is kept beside the sample."""
    same, other = read(root, *(ilvr(original_final_answer="B", answer=answer) for answer in ("B", "C")))
    assert (same.answer, same.meta) == ("B", {})
    assert other.reason == "'original_final_answer' is 'B' and 'answer' is 'C'; leave one of them out"
    mirage = {"text_input": "x", "text_output": r"<image> so \boxed{B}", "image_output": "b.png"}
    for answer, meta in (("B", {}), ("", {}), (None, {}), ("C", {"answer": "C"})):
        (sample,) = read(root, mirage | {"answer": answer})
        assert (sample.answer, sample.meta) == ("B", meta)


@pytest.mark.parametrize("marker", ["<image_1>", "<image 2>", "<Image>", "<|image|>", "<|image_1|>", "<image1>"])
def test_markers_of_other_formats_are_not_words(root, marker):
    """Catches images that stand before the text, whatever the order of their markers."""
    alone, bad = read(root, *(ilvr(text_input=f"In {marker}?", image_input=image) for image in ([], "a.png")))
    assert isinstance(alone, Sample)
    assert bad.reason == f"'{marker}' stands in the text, which marks no image; write <image>"
