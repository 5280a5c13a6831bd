"""`ilvr-ds ui` on three runs, an evaluation and a registered model, seen through Debian's Chromium.

Screenshots go to $ILVR_SCREENSHOTS, else outputs/screenshots.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.ranks import ROOT, free_port, heeding_ctrl_c
from tests.recipes import RECIPE

pytestmark = [pytest.mark.browser, pytest.mark.timeout(1800)]
SHOTS = Path(os.environ.get("ILVR_SCREENSHOTS", ROOT / "outputs/screenshots"))
CHROMIUM = "/usr/bin/chromium"
STEPS = 8
WAIT_MS = 60_000
RUNS = {"base": {}, "other-seed": {"run.seed": 1}, "higher-rate": {"optim.lr": 0.004}}


def command(*arguments: object) -> str:
    """Run ilvr-ds; returns its standard output."""
    environment = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    environment.pop("MLFLOW_TRACKING_URI", None)
    run = subprocess.run(
        [sys.executable, "-m", "ilvr_ds.cli", *map(str, arguments)],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-2000:]
    return run.stdout


@pytest.fixture(scope="module")
def outputs(tmp_path_factory: pytest.TempPathFactory, demo_folder: Path) -> Path:
    """Three runs of 8 steps in one store, and an evaluation of the first."""
    if not Path(CHROMIUM).exists():
        pytest.skip(f"{CHROMIUM} is not installed: apt-get install chromium")
    root = tmp_path_factory.mktemp("browser") / "outputs"
    for name, changes in RUNS.items():
        settings = {
            "run.name": name,
            "run.output_dir": root,
            "data.shards": demo_folder / "train",
            "data.eval_shards": demo_folder / "held_out",
            "model.path": demo_folder / "model",
            "train.max_steps": STEPS,
            "evaluation.max_samples": 16,
            "checkpoint.every_steps": 0,
            "tracking.every_steps": 1,
            "tracking.pictures_every_steps": 4,
            "tracking.picture_samples": 2,
            **changes,
        }
        command("train", "--config", RECIPE, *(word for k, v in settings.items() for word in ("--set", f"{k}={v}")))
    model, store = root / "base/model", f"sqlite:///{root / 'mlflow.db'}"
    command("export", root / "base", "--to", model)
    command(
        "evaluate", "--model", model, "--shards", demo_folder / "held_out", "--benchmark", "comt", "--max-samples", 6,
        "--max-new-tokens", 24, "--ablate-latents", "--tracking-uri", store,
    )  # fmt: skip
    return root


@dataclass
class Pages:
    """A browser page, the server's address and MLflow's ids."""

    page: Any
    server: str
    charts: str
    experiment: str
    runs: dict[str, str]

    def open(self, fragment: str) -> None:
        self.page.goto("about:blank")  # else a new fragment of the same address loads nothing
        self.page.goto(f"{self.server}/#/experiments/{self.experiment}{fragment}")

    def filter(self, text: str) -> None:
        self.page.get_by_placeholder("Search metric charts").fill(text, timeout=WAIT_MS)

    def shot(self, name: str) -> None:
        SHOTS.mkdir(parents=True, exist_ok=True)
        self.page.screenshot(path=str(SHOTS / f"{name}.png"))


@pytest.fixture(scope="module")
def server(outputs: Path) -> Iterator[str]:
    """The address that `ilvr-ds ui` prints."""
    port = free_port()
    ui = subprocess.Popen(
        [sys.executable, "-m", "ilvr_ds.cli", "ui", str(outputs), "--port", str(port)],
        cwd=ROOT, stdout=subprocess.PIPE, text=True,
        preexec_fn=heeding_ctrl_c,
    )  # fmt: skip
    try:
        assert ui.stdout is not None
        line = ui.stdout.readline()
        assert line.startswith("charts of experiment 'demo': http://127.0.0.1:"), line
        yield line.split(": ", 1)[1].strip()
    finally:
        ui.send_signal(signal.SIGINT)
        assert ui.wait(90) == 0, "Ctrl-C ends it well"


@pytest.fixture
def pages(outputs: Path, server: str) -> Iterator[Pages]:
    from playwright.sync_api import sync_playwright

    states = {name: json.loads((outputs / name / "mlflow.json").read_text()) for name in RUNS}
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])  # CI runs as root
        page = browser.new_page(viewport={"width": 1280, "height": 900})
        page.set_default_timeout(WAIT_MS)
        runs = {name: state["run_id"] for name, state in states.items()}
        yield Pages(page, server.split("/#")[0], server, states["base"]["experiment_id"], runs)
        browser.close()


LOADED = "part => [...document.images].some(image => image.src.includes(part) && image.naturalWidth)"
LINES = """() => [...document.querySelectorAll('.js-plotly-plot')].map(
    plot => Object.fromEntries((plot.data || []).map(line => [line.name, (line.x || []).length])))"""


def test_charts_draw_a_line_per_run_with_all_steps(pages: Pages) -> None:
    """Catches an address that opens another page, runs without a copy, and points that got lost."""
    pages.page.goto(pages.charts)
    pages.filter("loss/ce$")
    wanted = dict.fromkeys(RUNS, STEPS)
    deadline = time.monotonic() + WAIT_MS / 1000
    while wanted not in (lines := pages.page.evaluate(LINES)):
        assert time.monotonic() < deadline, f"{wanted} is not among {lines}"
        time.sleep(0.5)
    pages.page.get_by_role("button", name="Close", exact=True).click()  # a panel that wants to chat
    pages.filter("loss/")
    pages.page.locator(".js-plotly-plot").first.scroll_into_view_if_needed()
    time.sleep(3)  # for the picture only
    pages.shot("charts")


def test_compare_page_names_the_runs_and_what_differs(pages: Pages) -> None:
    """Catches params that were not sent, or not flattened."""
    ids = json.dumps(list(pages.runs.values()))
    pages.page.goto("about:blank")
    pages.page.goto(f'{pages.server}/#/compare-runs?runs={ids}&experiments=["{pages.experiment}"]')
    pages.page.get_by_text("Show diff only").first.click()
    for name in RUNS:
        pages.page.get_by_text(name, exact=True).first.wait_for()
    row = pages.page.locator("tr", has_text="run.seed").first
    row.wait_for()
    assert sorted(row.inner_text().split()) == ["0", "0", "1", "run.seed"]
    row = pages.page.locator("tr", has_text="optim.lr").first
    assert sorted(row.inner_text().split()) == ["0.002", "0.002", "0.004", "optim.lr"]
    assert pages.page.locator("tr", has_text="optim.weight_decay").count() == 0, "it is the same in all"
    row.scroll_into_view_if_needed()
    pages.shot("compare")


def test_run_page_shows_pictures_with_their_step(pages: Pages) -> None:
    """Catches pictures that do not reach the store, and those that MLflow does not show by itself (none at step 0)."""
    pages.open(f"/runs/{pages.runs['base']}/model-metrics")
    pages.filter("selection/sample 1")
    picture = pages.page.locator("img[src*='selection~sample']").first
    picture.wait_for(state="attached")
    picture.scroll_into_view_if_needed()
    pages.page.wait_for_function(LOADED, arg="selection~sample")
    assert "step%2B0%2B" in picture.get_attribute("src")
    picture.click()
    time.sleep(2)  # it grows
    pages.shot("selection")


def test_examples_and_score_pictures_belong_to_the_training_run(pages: Pages, outputs: Path) -> None:
    """Catches an evaluation beside its run instead of below it, and a table without images."""
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{outputs / 'mlflow.db'}")
    [run] = client.search_runs([pages.experiment], "tags.kind = 'evaluation'")
    assert run.data.tags["mlflow.parentRunId"] == pages.runs["base"] and run.info.run_name == "base-comt"
    files = [file.path for file in client.list_artifacts(run.info.run_id, "pictures")]
    assert "pictures/accuracy-comt-official.png" in files and "pictures/ablation-comt-official.png" in files
    pages.open(f"/runs/{run.info.run_id}/artifacts/examples.json")
    pages.page.get_by_role("button", name="Close", exact=True).click()
    for column in ("images", "question", "generated", "answer", "gold", "right"):
        pages.page.get_by_text(column, exact=True).first.wait_for()
    pages.page.wait_for_function(LOADED, arg="table_images")
    pages.page.get_by_text("held_out-0-0000000").first.wait_for()
    pages.shot("examples")
