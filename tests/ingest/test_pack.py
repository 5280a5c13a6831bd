"""Packing: what is accepted, what is left out and why, and nothing half-done."""

import dataclasses
import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ilvr_ds.data.reader import ShardReader
from ilvr_ds.data.sample import LatentStep, Sample, SampleError, TextStep
from ilvr_ds.data.shards import open_dataset
from ilvr_ds.errors import UserError
from ilvr_ds.ingest.pack import pack, pack_samples
from tests.data.packing import image_bytes, make_sample, write_jsonl


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Five lines: two good ones, a broken one, a long one, one whose image escapes."""
    (tmp_path / "a.png").write_bytes(image_bytes())
    good = {"text_input": "Why?", "image_input": "a.png", "group": "g", "text_output": "x<output_image>y"}
    good["image_output"] = "a.png"
    records = [good, b"{", good | {"text_input": "long " * 50}, good | {"image_input": "../a.png"}, good]
    return write_jsonl(tmp_path / "train.jsonl", records)


def words(sample: Sample) -> int:
    return len(sample.question.split())


def test_report_and_files(source, tmp_path):
    report = pack(source, tmp_path, tmp_path / "out", measure=words, measured_with={"unit": "words"}, max_tokens=10)
    assert (report.accepted, report.too_long, report.without_plan, report.groups) == (2, 1, 0, {"g": 2})
    assert [rejected.line for rejected in report.rejected] == [2, 3, 4]
    assert report.bytes == (tmp_path / "out" / "shard-000000.tar").stat().st_size
    written = [json.loads(line) for line in (tmp_path / "out" / "rejected.jsonl").read_text().splitlines()]
    assert written == [dataclasses.asdict(rejected) for rejected in report.rejected]
    assert written[1] == {"line": 3, "id": "train-3", "reason": "50 tokens, the limit is 10"}
    manifest = open_dataset(tmp_path / "out", "full").manifest
    assert manifest == report.manifest
    assert (manifest.rejected, manifest.longest_tokens, manifest.tokens_measured_with) == (3, 1, {"unit": "words"})
    assert manifest.source["file"] == "train.jsonl"
    text = "\n".join(report.lines())
    assert "2 samples in 1 shard" in text and "rejected: 3, of which too long: 1" in text
    assert "line 4 (train-4): input image '../a.png': the path leaves the image root" in text


@pytest.mark.parametrize(("regions", "missing"), [((1, 1), 0), ((1, 0), 1), ((0, 0), None)])
def test_samples_without_a_region_are_counted(tmp_path, regions, missing):
    """What `selection.pool: region` refuses, in one line, before anything is loaded."""
    samples = [
        dataclasses.replace(make_sample(n), steps=(LatentStep(0, (1, 0, 4, 2) if has else None), TextStep("x")))
        for n, has in enumerate(regions)
    ]
    pack_samples(samples, tmp_path / "out")
    shards = open_dataset(tmp_path / "out")
    assert shards.manifest.samples_without_region == missing
    assert [ShardReader(shards).read(n) for n in (0, 1)] == samples
    if missing == 0:
        shards.check_regions()
        return
    who = "no sample has a region" if missing is None else "1 of 2 samples have none"
    with pytest.raises(UserError, match=f"selection.pool is region, which every latent step needs, .*{who}; pack"):
        shards.check_regions()


@pytest.mark.parametrize(
    ("records", "said"),
    [
        (
            [f"{n}/gone.png" for n in range(9)],
            "all 9 records were rejected, line 1: input image '0/gone.png' is missing",
        ),
        (["gone.png"], "the only record was rejected, line 1: "),
        (["gone.png", "../a.png", 3, "lost.png"], "all 4 records were rejected, line 1: "),
    ],
)
def test_where_nothing_is_left_one_reason_is_said_once(tmp_path, records, said):
    """Catches "8 other reasons" for the same one with other names."""
    good = {"text_input": "Why?", "sequence_plan": []}
    source = write_jsonl(tmp_path / "train.jsonl", [good | {"image_input": name} for name in records])
    with pytest.raises(UserError) as error:
        pack(source, tmp_path, tmp_path / "out")
    assert f"nothing to pack: {said}" in str(error.value)
    others = 2 if 3 in records else 0
    assert str(error.value).endswith(f"; {others} of them for other reasons") == (others > 0)
    assert ("other reasons" in str(error.value)) == (others > 0)


def test_long_samples_stay_whole_without_a_limit(source, tmp_path):
    report = pack(source, tmp_path, tmp_path / "out", measure=words)
    assert (report.accepted, report.too_long, report.manifest.longest_tokens) == (3, 0, 50)
    assert ShardReader(open_dataset(tmp_path / "out")).read(1).question == "long " * 50


def test_progress_after_every_record(source, tmp_path):
    calls: list[tuple[int, int, int]] = []
    pack(source, tmp_path, tmp_path / "out", progress=lambda *call: calls.append(call))
    assert [call[:2] for call in calls] == [(1, 0), (2, 1), (3, 1), (4, 2), (5, 2)]
    assert 0 < calls[0][2] == calls[1][2] < calls[2][2]


def test_nothing_accepted_leaves_nothing(tmp_path):
    source = write_jsonl(tmp_path / "bad.jsonl", [{"text_input": "x", "image_input": "no.png"}, b"["])
    with pytest.raises(
        UserError, match=r"all 2 records were rejected, line 1: .*'no.png' is missing.*; 1 of them for another reason"
    ):
        pack(source, tmp_path, tmp_path / "out", format="mirage")
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(UserError, match=r"there are no records"):
        pack(tmp_path / "empty.jsonl", tmp_path, tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} == {"bad.jsonl", "empty.jsonl"}


def test_a_missing_input_is_named_before_anything_is_written(tmp_path):
    with pytest.raises(UserError, match=r"none.jsonl: cannot"):
        pack(tmp_path / "none.jsonl", tmp_path, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_mixed_formats_leave_nothing(source, tmp_path):
    source.write_bytes(source.read_bytes() + b'{"text_input": "x", "sequence_plan": []}\n')
    with pytest.raises(UserError, match=r"train.jsonl:6"):
        pack(source, tmp_path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_evaluation_samples_are_counted(tmp_path):
    source = write_jsonl(tmp_path / "test.jsonl", [{"text_input": "x", "map_desc": [[1]]}, {"text_input": "y"}])
    report = pack(source, tmp_path, tmp_path / "out")
    assert report.without_plan == 2
    assert "without a plan, for evaluation only: 2" in report.lines()
    assert ShardReader(open_dataset(tmp_path / "out")).read(0).meta == {"map_desc": "[[1]]"}


def test_samples_made_by_a_program(tmp_path):
    samples = [make_sample(0), make_sample(1), make_sample(0), dataclasses.replace(make_sample(2), question="\ud800")]

    def measure(sample: Sample) -> int:
        if sample.id == "sample-1":
            raise SampleError("the text holds the reserved token <|im_end|>")
        return 5

    report = pack_samples(iter(samples), tmp_path / "out", measure=measure)
    assert [(r.line, r.reason.split(" (")[0]) for r in report.rejected] == [
        (2, "the text holds the reserved token <|im_end|>"),
        (3, "the id already stands in line 1"),
        (4, "the text is not valid Unicode"),
    ]
    assert report.manifest.source is None
    assert ShardReader(open_dataset(tmp_path / "out")).read(0) == samples[0]


def test_long_lists_of_rejections_are_shortened_only_on_screen(tmp_path):
    samples = [make_sample(0)] * 31
    report = pack_samples(samples, tmp_path / "out")
    assert report.lines()[-1].startswith("  ... and 10 more in ")
    assert len((tmp_path / "out" / "rejected.jsonl").read_text().splitlines()) == 30


def test_what_cannot_be_printed_is_escaped(tmp_path, capsys):
    """Catches a traceback behind a data set that is whole: half a surrogate pair has no bytes."""
    report = pack_samples([make_sample(0), dataclasses.replace(make_sample(1), id="a\ud800\n")], tmp_path / "out")
    assert report.lines()[-1].startswith(r"  line 2 (a\ud800\n): the text is not valid Unicode")
    print("\n".join(report.lines()).encode().decode())
    assert json.loads((tmp_path / "out" / "rejected.jsonl").read_text())["id"] == "a\ud800\n"


def test_a_limit_without_a_measure_is_a_mistake_of_the_caller(tmp_path):
    with pytest.raises(ValueError, match=r"max_tokens needs measure"):
        pack_samples([make_sample(0)], tmp_path / "out", max_tokens=3)


def saved(image: Image.Image, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG", **options)
    return buffer.getvalue()


def test_pictures_that_are_shown_otherwise_than_they_are_stored_are_counted(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    grey = Image.fromarray(np.zeros((4, 4), np.uint16))
    turned, clear, deep = saved(Image.new("RGBA", (8, 4)), exif=exif), saved(Image.new("LA", (4, 4))), saved(grey)
    sample = make_sample(0)
    samples = [
        dataclasses.replace(sample, id="a", input_images=(turned, deep), helper_images=(clear,)),
        dataclasses.replace(sample, id="b", input_images=(image_bytes(),)),
    ]
    lines = pack_samples(samples, tmp_path / "out").lines()
    assert [line for line in lines if line.startswith("pictures ")] == [
        "pictures 16-bit grey, scaled to 8 bits: 1",
        "pictures turned upright: 1",
        "pictures with transparency, laid on white: 2",
    ]


def test_what_samples_lack_and_what_they_hold_besides_is_counted(source, tmp_path):
    latent = {"type": "latent", "helper_image": "a.png"}
    look = {"type": "text", "content": "Look."}
    record = {"text_input": "x", "image_input": "a.png", "sequence_plan": [look, latent], "original_final_answer": "A"}
    records = [
        record,
        record | {"image_input": None, "url": "u"},
        record | {"original_final_answer": "", "url": "v", "width": 3},
        record | {"sequence_plan": [look]},
        record | {"sequence_plan": []},
    ]
    report = pack(write_jsonl(tmp_path / "own.jsonl", records), tmp_path, tmp_path / "out")
    assert report.lines()[1:] == [
        "without a plan, for evaluation only: 1",
        "without an input image: 1",
        "without an answer: 1",
        "without a latent step: 1",
        "other keys, kept as they are: url (2), width (1)",
        "group (none): 5",
    ]
