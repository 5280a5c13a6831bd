"""Parquet files, saved data sets and folders of a hub repository's layout."""

from __future__ import annotations

import datetime
import json
import sys
from pathlib import Path
from typing import Any

import datasets
import huggingface_hub
import pyarrow
import pytest
from pyarrow import parquet

from ilvr_ds.data.sample import Sample
from ilvr_ds.errors import UserError
from ilvr_ds.ingest.containers import tables
from ilvr_ds.ingest.containers.opening import open_source
from ilvr_ds.ingest.importers import Importer, Rejected
from ilvr_ds.ingest.pack import pack
from tests.data.packing import image_bytes, write_jsonl
from tests.ingest.records import shapes

BROKEN = (2, 5, 8, 11, 14)


def row(n: int) -> dict[str, Any]:
    """Zebra-CoT's columns; five rows lack an image that their trace names."""
    second = None if n in BROKEN else {"bytes": image_bytes(n + 1), "path": None}
    return {
        "Question": f"Where is {n}? <image_start>[problem_image_1]<image_end>",
        "Text Reasoning Trace": "THOUGHT 0: Look. [reasoning_image_1] THOUGHT 1: So. [reasoning_image_2]",
        "Final Answer": str(n),
        "problem_image_1": {"bytes": None, "path": "a.png"},
        "reasoning_image_1": {"bytes": image_bytes(n), "path": "x.png"},
        "reasoning_image_2": second,
        "reasoning_image_3": None,
    }


ROWS = [row(n) for n in range(20)]
IMAGE_COLUMNS = [name for name in ROWS[0] if "image" in name]


def check(found: list[Sample | Rejected]) -> None:
    assert tuple(record.line - 1 for record in found if isinstance(record, Rejected)) == BROKEN
    assert all("'reasoning_image_2'" in record.reason for record in found if isinstance(record, Rejected))
    for n, sample in enumerate(found):
        if isinstance(sample, Sample):
            assert sample.helper_images == (image_bytes(n), image_bytes(n + 1))
            assert (sample.input_images, sample.answer, sample.meta) == ((image_bytes(0),), str(n), {})


def read(source: Path, root: Path, **choice: str) -> list[Sample | Rejected]:
    return [record for _, record in Importer(open_source(source, **choice), root)]


def dataset(root: Path) -> Any:
    """Its library looks for images by path when it saves them."""
    features = {name: datasets.Image() if name in IMAGE_COLUMNS else datasets.Value("string") for name in ROWS[0]}
    rows = [row | {"problem_image_1": {"bytes": None, "path": str(root / "a.png")}} for row in ROWS]
    return datasets.Dataset.from_list(rows, features=datasets.Features(features))


def test_a_parquet_file_is_read_by_row_group(root: Path) -> None:
    table = pyarrow.Table.from_pylist(ROWS)
    parquet.write_table(table, root.parent / "a.parquet", row_group_size=6)
    check(read(root.parent / "a.parquet", root))
    report = pack(root.parent / "a.parquet", root, root.parent / "out")
    assert "  row 3 (a-3): 'reasoning_image_2' is named in the text but holds no image" in report.lines()


def test_a_parquet_file_with_paths_and_nested_columns(root: Path) -> None:
    """In a table every step has every key; what is null is absent."""
    plan = [{"type": "text", "content": "Look."}, {"type": "latent", "helper_image": "b.png"}]
    records = [{"text_input": "Why?", "image_input": ["a.png"], "sequence_plan": plan, "text_output": None, "n": 3}]
    parquet.write_table(pyarrow.Table.from_pylist(records), root.parent / "a.parquet")
    (sample,) = read(root.parent / "a.parquet", root)
    assert (sample.input_images, sample.helper_images) == ((image_bytes(0),), (image_bytes(1),))
    assert sample.meta == {"n": "3"}


def test_a_saved_data_set(root: Path) -> None:
    dataset(root).save_to_disk(root.parent / "saved")
    check(read(root.parent / "saved", root))
    report = pack(root.parent / "saved", root, root.parent / "out")
    assert report.accepted == 15 and report.manifest.source == {"dataset": "saved"}
    with pytest.raises(UserError, match="saved: the data set has no splits; leave --split out"):
        read(root.parent / "saved", root, split="train")
    with pytest.raises(UserError, match="saved: `save_to_disk` wrote it, so it has no subsets; leave --subset out"):
        read(root.parent / "saved", root, subset="maze")


def test_splits_are_named(root: Path) -> None:
    one = dataset(root)
    datasets.DatasetDict({"train": one, "test": one.select([0])}).save_to_disk(root.parent / "saved")
    with pytest.raises(UserError, match="has the splits train, test; name one with --split"):
        read(root.parent / "saved", root)
    with pytest.raises(UserError, match="has no split 'trian'; did you mean 'train'"):
        read(root.parent / "saved", root, split="trian")
    check(read(root.parent / "saved", root, split="train"))


def hub_folder(folder: Path) -> Path:
    """A folder as a data set repository on the hub has it: a card with configurations, parquet files by split."""
    card = "---\nconfigs:\n"
    for config in ("maze", "chess"):
        (folder / config).mkdir(parents=True)
        for part in range(2):
            rows = ROWS[10 * part : 10 * part + 10]
            name = f"{config}/train-0000{part}-of-00002.parquet"
            parquet.write_table(pyarrow.Table.from_pylist(rows), folder / name)
        card += f"- config_name: {config}\n  data_files:\n  - split: train\n    path: {config}/train-*\n"
    (folder / "README.md").write_text(f"{card}---\n")
    return folder


def test_a_folder_with_the_layout_of_a_hub_repository(root: Path) -> None:
    folder = hub_folder(root.parent / "repository")
    check(read(folder, root, subset="maze"))
    with pytest.raises(UserError, match="repository: the `datasets` library cannot read it"):
        read(folder, root)


def test_a_hub_name_is_loaded_like_its_folder_at_one_commit(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is downloaded: the library is given the folder in the name's place."""
    folder = hub_folder(root.parent / "repository")
    load, asked = datasets.load_dataset, []

    def local(name: str, subset: str | None, **options: Any) -> Any:
        asked.append((name, subset, options))
        return load(str(folder), subset, streaming=options["streaming"])

    monkeypatch.setattr(datasets, "load_dataset", local)
    monkeypatch.setattr(tables, "_newest_commit", lambda name: "0123abc")
    source = open_source("hf:owner/name", subset="maze")
    check([record for _, record in Importer(source, root)])
    assert asked == [("owner/name", "maze", {"streaming": True, "revision": "0123abc"})]
    assert source.origin == {"dataset": "hf:owner/name", "split": "train", "revision": "0123abc"}


def test_a_hub_that_cannot_be_reached_is_one_line(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No port of this host answers."""
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(UserError, match=r"^hf:owner/name: no such data set can be reached on the hub"):
        open_source("hf:owner/name")


@pytest.mark.parametrize(
    ("library", "name", "what"),
    [
        ("pyarrow", "a.parquet", "a parquet file needs pyarrow"),
        ("datasets", "folder", "a Hugging Face data set needs datasets"),
        ("zstandard", "a.jsonl.zst", "a file compressed with zstd needs zstandard"),
    ],
)
def test_a_missing_library_is_one_line(
    root: Path, library: str, name: str, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = root.parent / name
    if name == "folder":
        path.mkdir()
    else:
        path.write_bytes(b"PAR1" if name == "a.parquet" else b"\x28\xb5\x2f\xfd")
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(UserError, match=rf"{name}: {what}; pip install '.\[formats\]'$"):
        read(path, root)


def test_json_lines_in_a_folder(root: Path) -> None:
    folder = root.parent / "folder"
    folder.mkdir()
    record = {"text_input": "Why?", "image_input": "a.png", "text_output": "x<image>", "image_output": "b.png"}
    (folder / "train.jsonl").write_text(json.dumps(record) + "\n")
    (sample,) = read(folder, root)
    assert (sample.id, sample.helper_images) == ("folder-1", (image_bytes(1),))


def test_steps_with_different_keys_which_datasets_keeps_as_json(root: Path) -> None:
    """The authors' own format in the JSON Lines of a hub repository, saved, and written to parquet."""
    plan = [{"type": "text", "content": "Look."}, {"type": "latent", "helper_image": "b.png", "region": [2, 2, 4, 4]}]
    records = [{"id": n, "text_input": "Why?", "image_input": ["a.png"], "sequence_plan": plan} for n in range(2)]
    write_jsonl(root / "train.jsonl", records)
    saved = datasets.Dataset.from_list(records, on_mixed_types="use_json")
    saved.save_to_disk(root.parent / "saved")
    saved.to_parquet(root.parent / "a.parquet")
    for source in (root, root.parent / "saved", root.parent / "a.parquet"):
        found = read(source, root)
        assert all(isinstance(sample, Sample) and shapes(sample) == ["Look.", 0] for sample in found), found
        assert [sample.steps[1].region for sample in found] == [(2, 2, 4, 4)] * 2


def test_integers_of_which_one_is_missing_stay_integers(root: Path) -> None:
    """pandas writes such a column as one of floats, and the answer 2.0 stands in no text."""
    plan = [{"type": "text", "content": "The final answer is: 2"}]
    record = {"text_input": "Why?", "sequence_plan": plan}
    rows = [record | {"id": id, "answer": answer} for id, answer in ((7.0, 2.0), (None, None), (9.0, 2.5))]
    parquet.write_table(pyarrow.Table.from_pylist(rows), root.parent / "a.parquet")
    found = read(root.parent / "a.parquet", root)
    assert [(sample.id, sample.answer) for sample in found] == [("7", "2"), ("a-2", ""), ("9", "2.5")]


@pytest.mark.parametrize(("value", "words"), [(b"2", "bytes"), (datetime.date(2026, 1, 2), "of the table's type date")])
def test_values_that_json_has_no_word_for_are_named(root: Path, value: Any, words: str) -> None:
    record = {"text_input": "Why?", "sequence_plan": [], "answer": value}
    parquet.write_table(pyarrow.Table.from_pylist([record]), root.parent / "a.parquet")
    (rejected,) = read(root.parent / "a.parquet", root)
    assert rejected.reason == f"'answer' is {words}, expected text or a number"


def test_a_column_that_stands_twice_is_named(root: Path) -> None:
    """pyarrow alone would take the last and say nothing."""
    table = pyarrow.Table.from_pylist(ROWS[:1])
    parquet.write_table(table.append_column("Final Answer", pyarrow.array(["9"])), root.parent / "a.parquet")
    with pytest.raises(UserError, match=r"a\.parquet: the column 'Final Answer' stands twice; rename one of them"):
        read(root.parent / "a.parquet", root)
