from __future__ import annotations

import io
import json
from pathlib import Path

from PIL import Image

from ilvr_ds.data.sample import Sample
from ilvr_ds.evaluation.charts import draw_scores
from ilvr_ds.evaluation.examples import HEIGHT, marked_text, side_by_side
from ilvr_ds.generation.answers import Answer
from ilvr_ds.generation.loading import Reasoner
from ilvr_ds.tracking.registry import read_origin, write_origin


def test_segments_are_marked_where_they_were(reasoner: Reasoner) -> None:
    """Catches marks at the end, and a segment that the limit cut off before its first latent."""
    special, tokenizer = reasoner.special, reasoner.encoder.tokenizer
    first, second = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in ("one", "two"))
    segment = [special.latent_start, *[special.latent_pad] * 3, special.latent_end]
    tokens = [*first, *segment, *second, special.latent_start]
    answer = Answer("a", "onetwo", tokens, steps=(3, 0), hit_limit=True)
    assert marked_text(reasoner, answer) == "one [segment 1: 3 latents] two [segment 2: 0 latents]"
    assert marked_text(reasoner, Answer("a", "one", first, steps=(), hit_limit=False)) == "one"


def test_input_images_stand_in_one_row() -> None:
    """Catches rows of a table without an image: MLflow refuses a column that mixes images and text."""
    data = io.BytesIO()
    Image.new("RGB", (20, 10), "red").save(data, "PNG")
    row = side_by_side(Sample("a", "?", steps=(), input_images=(data.getvalue(),) * 2))
    assert row.size == (2 * (2 * HEIGHT + 8), HEIGHT)
    assert row.getpixel((5, 5)) == row.getpixel((2 * HEIGHT + 20, 5)) == (255, 0, 0)
    assert side_by_side(Sample("a", "?", steps=())).height == HEIGHT


def test_scores_become_a_picture_for_each_rule(tmp_path: Path) -> None:
    types = {"": {"samples": 4, "right": 1, "accuracy": 0.25, "chance": None}}
    effects = {"zeros": {"accuracy": 0.0, "difference": -0.25, "interval_95": [-0.5, 0.0]}}
    rules = {"exact": {"accuracy": 0.25, "macro_mean": 0.25, "types": types}}
    files = draw_scores({"rules": rules, "ablation": {"exact": effects}}, "exact-match", tmp_path)
    assert [file.name for file in files] == ["accuracy-exact.png", "ablation-exact.png"]
    assert all(Image.open(file).width == 1000 for file in files)


def test_a_model_knows_the_run_that_it_came_from(tmp_path: Path) -> None:
    """Catches an id that the checkpoint lacks because the server was slow, while the run's folder has it."""
    recipe = {"train": {"stage": 1}, "tracking": {"experiment": "e"}, "selection": {"pool": "changed"}}
    state = {"step": 3, "recipe": recipe, "mlflow_run_id": None}
    checkpoint = tmp_path / "run/checkpoints/step-00000003"
    checkpoint.mkdir(parents=True)
    write_origin(tmp_path, state, checkpoint)
    assert read_origin(str(tmp_path))["mlflow_run_id"] is None
    (tmp_path / "run/mlflow.json").write_text(json.dumps({"run_id": "r", "experiment": "f", "uri": "sqlite:////a.db"}))
    write_origin(tmp_path, state, checkpoint)
    origin = read_origin(str(tmp_path))
    assert (origin["run"], origin["step"], origin["mlflow_run_id"], origin["experiment"]) == ("run", 3, "r", "f")
    assert origin["selection"] == {"pool": "changed"}
    assert read_origin("Qwen/Qwen2.5-VL-7B-Instruct") == {}
