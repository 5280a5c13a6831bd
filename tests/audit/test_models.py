"""Audits of stock models as they come: in the released layout, and with adapters."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ilvr_ds.cli import answering as command
from ilvr_ds.cli import main
from ilvr_ds.data.tokens import load_tokenizer
from tests.audit.test_command import numbers_of, stock
from tests.evaluation.exporting import export_base
from tests.evaluation.released import old_layout

Audit = Callable[[Path], dict[str, Any]]


@pytest.fixture
def audited(planted_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Audit:
    """Audits a model whose answers all begin with a segment, as random weights do not by themselves."""
    special = load_tokenizer(str(planted_folder / "model"), add_latent_tokens=False)[1]
    settings = command.generation_settings  # type: ignore[attr-defined]

    def opening(options: Any) -> Any:
        return replace(settings(options), forced={0: special.latent_start})

    monkeypatch.setattr(command, "generation_settings", opening)

    def audit(model: Path) -> dict[str, Any]:
        output = tmp_path / f"audit-{model.name}"
        tests = ("--samples", "8", "--tests", "replacement,inside,barred")
        assert main([*stock(planted_folder, output), "--model", str(model), *tests]) == 0
        report = numbers_of(output)
        assert report["latents"]["segments_per_answer"] >= 1 and report.pop("model") == str(model)
        return report

    return audit


@pytest.mark.parametrize("kind", ["bin", "safetensors"])
def test_the_released_layout_is_audited_as_ours(
    planted_folder: Path, tmp_path: Path, audited: Audit, kind: str
) -> None:
    ours = planted_folder / "model"
    assert_alike(audited(old_layout(ours, tmp_path / "released", kind)), audited(ours))


def assert_alike(a: Any, b: Any, place: str = "") -> None:
    """Equal, but for the rounding of float32: on some processors a product's last bits depend on where weights lie."""
    if isinstance(a, dict) and isinstance(b, dict):
        assert a.keys() == b.keys(), place
        for key in a:
            assert_alike(a[key], b[key], f"{place}/{key}")
    elif isinstance(a, list) and isinstance(b, list):
        assert len(a) == len(b), place
        for number, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_alike(x, y, f"{place}/{number}")
    elif isinstance(a, float) and isinstance(b, float):
        assert a == pytest.approx(b, abs=1e-5), place  # log-probabilities of up to 10, a rounding error of 1e-6 each
    else:
        assert a == b, place


def test_merged_adapters_are_in_the_audit_and_those_apart_are_named(
    planted_folder: Path,
    tmp_path: Path,
    audited: Audit,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Catches an audit of the base where that of the trained model was meant."""
    base, lora = planted_folder / "model", ("model.lora_rank=4",)
    merged = audited(export_base(base, tmp_path / "merged", monkeypatch, *lora, random=True))
    assert "adapter" not in capsys.readouterr().err
    apart = audited(export_base(base, tmp_path / "apart", monkeypatch, *lora, random=True, adapters="apart"))
    assert f"apart answers without the adapters in {tmp_path / 'apart/adapter'}" in capsys.readouterr().err
    plain = audited(base)
    assert merged["selection_from"] == apart["selection_from"] == "the model's training run"
    for part in ("latents", "attention"):
        assert apart["inside"][part] == plain["inside"][part] != merged["inside"][part]
    assert merged["replacement"]["true"]["samples"] == 8 and merged["inside"]["retrieval"]["latents"]
