"""What is drawn of a run: gaze and curves on the golden model, in this process."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from ilvr_ds.config import load_recipe
from ilvr_ds.tracking.record import Record, read_record
from ilvr_ds.tracking.tracker import Tracker, TrackingTarget
from ilvr_ds.training.pictures import Pictures, panels_of
from tests.ranks import ROOT, run_ranks
from tests.stores import with_tables

RECIPE = "launch/recipes/demo.yaml"


def test_steps_that_were_trained_again_replace_the_first(tmp_path: Path) -> None:
    """Catches curves that run back in time after a restart."""
    record = Record(tmp_path / "metrics.jsonl")
    for step, value in ((1, 3.0), (2, 2.0), (3, 9.0), (2, 1.0), (3, 0.5), (4, 7.0)):
        record.metrics(step, {"loss/ce": value, "loss/ce_by_type/a": value, "lr": 1.0})
    panels = panels_of(tmp_path / "metrics.jsonl", 3)
    assert panels["losses"] == {"loss/ce": ([1, 2, 3], [3.0, 1.0, 0.5])}
    assert list(panels["cross-entropy by kind of task"]) == ["loss/ce_by_type/a"]
    assert len(panels) == 2


@pytest.fixture
def tracker(tmp_path: Path) -> Iterator[Tracker]:
    tracker = Tracker(tmp_path / "run", TrackingTarget("http://127.0.0.1:9", "e", "run", tmp_path), params={}, tags={})
    yield tracker
    tracker.close("KILLED", timeout_s=0)


def test_a_disk_that_takes_no_picture_does_not_end_the_run(
    tmp_path: Path, tracker: Tracker, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "run/pictures").write_text("a file where the folder should be")
    pictures = Pictures(tracker, tmp_path / "run")
    pictures(1)
    pictures.finish()
    assert "step 1: no pictures in" in caplog.text


@pytest.mark.parametrize("world", [1, 2])
def test_a_run_draws_at_start_at_its_steps_and_at_the_end(tmp_path: Path, demo_folder: Path, world: int) -> None:
    """Catches ranks that do not look together, pictures that change the run, and files that the record lacks."""
    weights = {}
    for count in (2, 0):
        overrides = {
            "run.output_dir": with_tables(tmp_path), "run.name": f"drawn-{count}",
            "data.shards": demo_folder / "train", "data.eval_shards": demo_folder / "held_out",
            "model.path": demo_folder / "model", "train.max_steps": 4, "evaluation.max_samples": 16,
            "checkpoint.every_steps": 0, "tracking.pictures_every_steps": 2, "tracking.picture_samples": count,
            "tracking.every_steps": 1,
        }  # fmt: skip
        results = run_ranks(
            "tests.distributed.workers_run:train", world, tmp_path / f"ranks-{count}", recipe=RECIPE,
            overrides=[f"{key}={value}" for key, value in overrides.items()],
        )  # fmt: skip
        weights[count] = results[0]["weights"]
    for name, tensor in weights[2].items():
        assert torch.equal(tensor, weights[0][name]), name
    assert not (tmp_path / "drawn-0/pictures").exists()
    lines = [line for line, _ in read_record(tmp_path / "drawn-2/metrics.jsonl") if line.get("event") == "picture"]
    keys = {"selection/sample 1", "selection/sample 2", "latents/sample 1", "latents/sample 2"}
    drawn = {step: {line["key"] for line in lines if line["step"] == step} for step in (0, 2, 4)}
    assert drawn == {0: keys, 2: keys | {"curves"}, 4: keys | {"curves"}}
    folder = tmp_path / "drawn-2/pictures"
    assert sorted(line["file"] for line in lines) == sorted(path.name for path in folder.iterdir())


def test_the_recipe_refuses_more_samples_than_can_be_looked_at() -> None:
    from ilvr_ds.errors import UserError

    with pytest.raises(UserError, match="picture_samples"):
        load_recipe(RECIPE, ["tracking.picture_samples=17"])


@pytest.mark.parametrize(
    ("stage", "selection"),
    [
        (1, ["pool=all"]),
        (1, ["pool=changed"]),
        (1, ["pool=changed", "by=change", "unchanged=none"]),
        (2, ["pool=all"]),
    ],
)
def test_views_hold_what_was_chosen(demo_folder: Path, tmp_path: Path, stage: int, selection: list[str]) -> None:
    """Catches maps whose cells are not those of the candidates: the best score is the first selected patch."""
    recipe, changes = (RECIPE, []) if stage == 1 else ("launch/recipes/demo-stage2.yaml", ["model.init_from=null"])
    changes += [f"selection.{setting}" for setting in selection]
    arguments = {"demo": str(demo_folder), "recipe": recipe, "changes": changes}
    views = run_ranks("tests.training.views:views", 1, tmp_path, **arguments)[0]
    assert len(views) == 3
    for view in views:
        assert view.segments and view.question
        for segment in view.segments:
            assert segment.selection is not None
            score, cells = segment.selection.score, segment.selection.cells
            inside = segment.selection.pool
            assert (inside is None) == (selection == ["pool=all"])
            has_query = selection[-1] != "unchanged=none"
            assert segment.selection.score_name == ("cosine to the query" if has_query else "change")
            if inside is not None and not inside:
                assert not has_query and not cells, "nothing differs"
                continue
            known = [score[cell] for cell in inside] if inside else score
            assert score[cells[0][0]] == pytest.approx(np.nanmax(known), abs=1e-5)
            assert inside is None or {cell for group in cells for cell in group} <= inside
            assert segment.latents.shape == (4, *score.shape)
            rows, columns = score.shape
            assert segment.helper.shape[0] * columns == segment.helper.shape[1] * rows


def test_a_sample_that_cannot_be_read_again_is_left_out(demo_folder: Path, tmp_path: Path) -> None:
    """Catches a read error on the main rank alone, which the others would wait for."""
    [views] = run_ranks("tests.training.views:views_of_what_went_away", 1, tmp_path, demo=str(demo_folder))
    assert len(views) == 2


@pytest.mark.parametrize("zero", ["zero2", "zero3"])
def test_in_stage_2_each_map_is_the_cosine_of_the_students_own_latent(
    demo_folder: Path, tmp_path: Path, zero: str
) -> None:
    """Catches maps of the slot beside, helper images mixed up, and ranks that do not look together."""
    arguments = {"demo": str(demo_folder), "deepspeed": str(ROOT / f"ds_configs/{zero}.json")}
    main, other = run_ranks("tests.training.views:free_views", 2, tmp_path, **arguments)
    assert len(main["views"]) == 2 and other["views"] == []
    assert main["is_training"] and other["is_training"]
    for view, maps in zip(main["views"], main["maps"], strict=True):
        for segment, expected in zip(view.segments, maps, strict=True):
            assert segment.selection is None and segment.latents.ndim == 3
            np.testing.assert_allclose(segment.latents.reshape(4, -1), expected, atol=1e-5)
