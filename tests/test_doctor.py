from __future__ import annotations

import shutil
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest
import torch

from ilvr_ds import cli, doctor, provenance
from ilvr_ds.doctor import Check, render, report


@pytest.fixture(autouse=True)
def leave_logging_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli, "_set_up_logging", lambda rank: None)


def pretend(monkeypatch: pytest.MonkeyPatch, **versions: str | None) -> None:
    """Make a machine with a compiler where some packages have other versions, or are missing (None)."""

    def pretended(name: str) -> str:
        found = versions.get(name.replace("-", "_"), "") or ""
        if found:
            return found
        if name.replace("-", "_") in versions:
            raise PackageNotFoundError(name)
        return version(name)

    monkeypatch.setattr(provenance, "version", pretended)
    monkeypatch.setattr(shutil, "which", lambda name: sys.executable)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def found(name: str) -> Check:
    [check] = [check for check in report() if check.name == name]
    return check


def test_the_report_tells_what_is_installed() -> None:
    rows = {check.name: check for check in report()}
    assert rows["python"] == Check("python", "ok", sys.version.split()[0])
    for name in ("torch", "transformers", "deepspeed", "webdataset", "peft"):
        assert version(name) in rows[name].detail
    assert {"attention", "c++", "ninja", "extension cache", "working directory", "temporary files"} <= rows.keys()


def test_names_and_details_stand_in_columns_and_remedies_below() -> None:
    lines = render([Check("a", "ok", "1.0"), Check("much-longer", "missing", "gone", "get it")]).splitlines()
    assert lines == [
        "ok       a            1.0",
        "missing  much-longer  gone",
        "                      -> get it",
    ]


def test_another_version_is_a_note(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, torch="2.0.1")
    check = found("torch")
    assert check.status == "note" and check.remedy
    assert check.detail == "2.0.1; tested with >=2.11,<2.14"


@pytest.mark.parametrize("build", ["2.13.0+cpu", "2.13.0.dev20260101+cu129"])
def test_a_build_of_a_tested_version_is_ok(monkeypatch: pytest.MonkeyPatch, build: str) -> None:
    pretend(monkeypatch, torch=build)
    assert found("torch") == Check("torch", "ok", build)


def test_a_missing_required_package_is_bad_and_the_command_fails(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pretend(monkeypatch, webdataset=None)
    assert found("webdataset") == Check("webdataset", "bad", "not installed", "pip install -c constraints.txt .")
    assert cli.main(["doctor"]) == 1
    assert "-> pip install -c constraints.txt ." in capsys.readouterr().out


def test_mlflow_may_be_there_in_either_form(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, mlflow_skinny=None, mlflow="3.1")
    assert not [check for check in report() if check.name == "mlflow-skinny"]
    pretend(monkeypatch, mlflow_skinny=None, mlflow=None)
    assert found("mlflow-skinny").status == "bad"


def test_a_data_set_is_checked_to_the_last_byte(demo_folder: Path, tmp_path: Path) -> None:
    """Catches a byte that was changed by copying, which neither sizes nor indexes show."""
    packed = tmp_path / "train"
    shutil.copytree(demo_folder / "train", packed)
    check = doctor.check_shards(str(packed))
    assert check.status == "ok" and check.detail.endswith("as packed")
    tar = packed / "shard-000000.tar"
    content = bytearray(tar.read_bytes())
    content[700] ^= 1
    tar.write_bytes(content)
    check = doctor.check_shards(str(packed))
    assert check.status == "bad" and "its bytes are not those that were packed" in check.detail


def test_missing_options_do_not_fail_the_command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pretend(monkeypatch, mlflow=None, bitsandbytes=None, liger_kernel=None, mlflow_skinny="3.1", flash_attn=None)
    assert cli.main(["doctor"]) == 0
    table = capsys.readouterr().out
    assert table.count("missing ") == 3 and "adamw_8bit" in table


def test_no_accelerator_is_a_note(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch)
    assert found("accelerator").status == "note"


def test_no_compiler_is_bad_and_says_how_to_get_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    check = found("c++")
    assert check.status == "bad" and "apt-get install g++" in check.remedy
