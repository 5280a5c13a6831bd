from __future__ import annotations

import logging
import os
import re
import runpy
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from subprocess import PIPE
from typing import get_args

import pytest
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from ilvr_ds import cli, provenance
from ilvr_ds.cli.data import FORMATS
from ilvr_ds.ingest.importers import Format
from ilvr_ds.launcher import Place
from tests.full_disk import files_end_at
from tests.ranks import ROOT
from tests.recipes import RECIPE

COMMANDS = [
    "doctor",
    "plan",
    "demo-data",
    "pack",
    "inspect",
    "encode",
    "settings",
    "train",
    "ui",
    "compare",
    "mlflow-sync",
    "export",
    "generate",
    "evaluate",
    "audit",
    "serve",
]
TEXTS = [ROOT / "README.md", ROOT / "Makefile", ROOT / "CONTRIBUTING.md"]
TEXTS += [path for folder in ("docs", "ilvr_ds", "launch") for path in sorted((ROOT / folder).rglob("*.*"))]
TEXTS = [path for path in TEXTS if path.suffix in ("", ".md", ".py", ".sh", ".yaml", ".example")]

Run = Callable[..., str]


@pytest.fixture(autouse=True)
def leave_logging_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli, "_set_up_logging", lambda rank: None)
    monkeypatch.setattr(cli.logger, "handlers", [])


@pytest.fixture
def fails(capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs a command that must end with exit code 2, one line on standard error and nothing else; returns the line."""

    def fails(*arguments: str | Path, prefix: str = "ilvr-ds: error: ") -> str:
        capsys.readouterr()
        assert cli.main([str(argument) for argument in arguments]) == 2
        captured = capsys.readouterr()
        assert captured.out == ""
        [line] = captured.err.splitlines()
        assert line.startswith(prefix)
        return line.removeprefix(prefix)

    return fails


@pytest.fixture
def demo(demo_folder: Path) -> Path:
    return demo_folder


def recipe(demo: Path, *changes: str) -> list[str]:
    """The demo recipe on this demo's model and data."""
    settings = (f"model.path={demo / 'model'}", f"data.shards={demo / 'train'}", *changes)
    return ["--config", RECIPE, *(word for setting in settings for word in ("--set", setting))]


def test_pack_says_what_it_packed(demo: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    arguments = ["pack", "--input", f"{demo}/task/held_out.jsonl", "--output", f"{tmp_path}/d", *recipe(demo)]
    assert cli.main(arguments) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(f"{tmp_path}/d: 16 samples in 1 shard, ")
    assert re.fullmatch(r"longest sample: \d+ tokens", lines[1])
    assert sum(int(line.rsplit(" ", 1)[1]) for line in lines if line.startswith("group ")) == 16


def test_pack_says_what_it_takes_its_input_for(demo: Path, caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    """At once, so that a wrong guess costs no hours."""
    source = demo / "task" / "held_out.jsonl"
    with caplog.at_level(logging.INFO, "ilvr_ds"):
        assert cli.main(["pack", "--input", str(source), "--output", f"{tmp_path}/d"]) == 0
    assert f"{source}: JSON Lines, taken for ilvr: of line 1, it has the key 'sequence_plan'" in caplog.messages


def test_pack_offers_all_formats() -> None:
    assert tuple(FORMATS) == get_args(Format)


def test_inspect_prints_a_sample_as_the_model_sees_it(demo: Path, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    assert cli.main(["inspect", "--sample", "1", *recipe(demo)]) == 0
    text = capsys.readouterr().out
    assert "id        train-0-0000001" in text
    assert "[4 latent tokens]" in text and "[16 image tokens]" in text
    assert re.search(r"answer +' ?[A-D]'", text)


def test_a_rejected_record_is_reported_with_its_line(
    demo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    records = (demo / "task" / "train.jsonl").read_text().splitlines()
    records[2] = re.sub(r'"helper_image": "[^"]*"', '"helper_image": "gone.png"', records[2])
    source = tmp_path / "some.jsonl"
    source.write_text("\n".join(records))
    arguments = ["pack", "--input", source, "--image-root", demo / "task", "--output", tmp_path / "d"]
    assert cli.main([str(argument) for argument in arguments]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "rejected: 1, of which too long: 0" in lines
    assert re.fullmatch(r"  line 3 \(train-0-0000002\): helper image .*gone.png.*", lines[-1])


def test_only_missing_images_fail_with_the_first_line(demo: Path, tmp_path: Path, fails: Run) -> None:
    arguments = ("pack", "--input", demo / "task" / "train.jsonl", "--output", tmp_path / "d")
    message = fails(*arguments, "--image-root", tmp_path)
    assert "nothing to pack: all 64 records were rejected, line 1: input image " in message
    assert not (tmp_path / "d").exists()


def test_samples_that_are_too_long_are_rejected(demo: Path, tmp_path: Path, fails: Run) -> None:
    arguments = ("pack", "--input", demo / "task" / "train.jsonl", "--output", tmp_path / "d")
    message = fails(*arguments, *recipe(demo, "data.max_tokens=50"))
    assert re.search(r"line 1: \d+ tokens, the limit is 50", message)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("pack --input nowhere.jsonl --output {tmp}/d", "nowhere.jsonl: cannot read the records (No such file"),
        ("pack --input {demo}/task/train.jsonl --output {demo}/train", "train: is not empty"),
        ("pack --input {demo}/task/train.jsonl --image-root no --output {tmp}/d", "no: the image root is not a folder"),
        ("pack --input {demo}/task/train.jsonl --output {tmp}/d --config {tmp}/none.yaml", "none.yaml: cannot read"),
        ("inspect --config {tmp}/none.yaml", "none.yaml: cannot read the recipe (No such file or directory)"),
        ("train --config {tmp}/none.yaml", "none.yaml: cannot read the recipe (No such file or directory)"),
        ("train {recipe} --set optim.lrr=1", "--set optim.lrr=1: unknown key 'optim.lrr'; did you mean 'optim.lr'?"),
        ("inspect {recipe} --sample 64", "--sample 64: the data set has samples 0 to 63"),
        ("inspect {recipe} --sample -1", "--sample -1: the data set has samples 0 to 63"),
        ("inspect {recipe} --set data.max_tokens=50", "tokens, data.max_tokens allows 50"),
        ("inspect {recipe} --set data.shards={tmp}", "expected a folder that `ilvr-ds pack` wrote"),
        ("inspect {recipe} --set data.shards={tmp}/no", "expected a folder that `ilvr-ds pack` wrote"),
        ("inspect {recipe} --set model.path={tmp}/no", "model.path: no model at '{tmp}/no' ("),
        ("inspect {recipe} --set model.path={tmp}", "model.path: no model at '{tmp}' ("),
        ("encode --shards {demo}/train", "encode: give --shards and --model, or a recipe by --config"),
        ("encode {recipe} --output {tmp} --part 2/2", "--part 2/2: expected I/N with I from 0 to N-1"),
        ("encode {recipe} --output {tmp} --shards {tmp}", "expected a folder that `ilvr-ds pack` wrote"),
        ("encode {recipe} --output {tmp} --model {tmp}/no", "model.path: no image processor at '{tmp}/no' ("),
        ("encode {recipe} --set model.random_init=true", "model.random_init: the vision tower is drawn at random"),
        ("encode {recipe} --workers -1", "--workers must be 0 or more, --batch-patches 1 or more"),
        ("encode {recipe} --max-image-pixels -5", "--max-image-pixels -5: must be from 3136 to 67108864"),
        ("encode --shards {demo}/train --set data.x=1", "--set data.x=1: overrides a key of a recipe; give one by"),
        ("pack --input {demo}/task/train.jsonl --output {tmp}/d --set data.max_tokens=9", "give one by --config"),
        ("export {tmp} --to {tmp}/m --register a/b", "--register 'a/b': expected a name without / and :"),
        ("export {tmp} --to {tmp}/m --register x --tracking-uri bogus://x", "--tracking-uri bogus://x: "),
        ("mlflow-sync {tmp}", "{tmp}: holds no mlflow.json; give the folder of a run"),
        ("demo-data --output {demo}", "demo/task: exists already"),
        ("demo-data --output {tmp}/d --grid 5", "grid: 5 cells a side; choose 4, 6 or 8"),
        ("demo-data --output {tmp}/d --seed -1 --train 1", "seed: -1 is negative"),
    ],
)  # fmt: skip
def test_a_mistake_is_one_line(demo: Path, tmp_path: Path, fails: Run, arguments: str, words: str) -> None:
    names = {"demo": demo, "tmp": tmp_path, "recipe": shlex.join(recipe(demo))}
    assert words.format(tmp=tmp_path) in fails(*shlex.split(arguments.format(**names)))


def test_a_model_without_the_special_tokens_is_a_mistake(demo: Path, tmp_path: Path, fails: Run) -> None:
    shutil.copy(demo / "model" / "config.json", tmp_path)
    plain = Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="a"))
    PreTrainedTokenizerFast(tokenizer_object=plain).save_pretrained(tmp_path)
    message = fails("inspect", *recipe(demo, f"model.path={tmp_path}"))
    assert "lacks <|im_start|>, <|im_end|>" in message and "it is not a tokenizer of Qwen2.5-VL or Qwen3-VL" in message


def test_another_kind_of_model_is_a_mistake(demo: Path, tmp_path: Path, fails: Run) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    message = fails("inspect", *recipe(demo, f"model.path={tmp_path}"))
    assert "holds a bert model; expected qwen2_5_vl" in message


def test_other_ranks_name_themselves(fails: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in Place(3, 1, 4, "node-1", 29500).variables().items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(cli, "GRACE_S", 0.0)
    assert "cannot read the recipe" in fails("train", "--config", "none.yaml", prefix="[rank 3] ilvr-ds: error: ")


def test_half_a_launcher_is_a_mistake(fails: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "3")
    assert "RANK is set but LOCAL_RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT is not" in fails("train", "--config", "x")


@pytest.mark.parametrize(
    "arguments", ["pack --input a --output b --format parquet", "pack --input a", "trian --config r", "", "train --x"]
)
def test_a_wrong_command_line_ends_with_code_2(arguments: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit:
        cli.main(arguments.split())
    assert exit.value.code == 2
    assert "error: " in capsys.readouterr().err.splitlines()[-1]


def test_help_lists_exactly_the_commands(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit:
        cli.main(["--help"])
    assert exit.value.code == 0
    assert re.findall(r"^    (\S+)", capsys.readouterr().out, re.MULTILINE) == COMMANDS


@pytest.mark.parametrize("command", COMMANDS)
def test_a_commands_help_says_what_it_does_and_where_more_is(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main([command, "--help"])
    said = capsys.readouterr().out
    page = re.search(r"^More: (docs/\S+)$", said, re.MULTILINE)
    assert page and f"ilvr-ds {command}" in " ".join((ROOT / page[1]).read_text().split())
    assert re.search(r"^[A-Z].*\.$", said, re.MULTILINE), "a sentence"


def test_audits_help_names_its_tests() -> None:
    from ilvr_ds.audit.settings import TESTS, parse_tests

    options = cli._parser().parse_args(["audit", "--model", "m"])
    assert parse_tests(options.tests) == TESTS, "written out in its options, which import nothing heavy"


def test_no_text_speaks_of_a_command_that_does_not_exist() -> None:
    named = {(path.name, word) for path in TEXTS for word in re.findall(r"ilvr-ds ([a-z][a-z-]*)", path.read_text())}
    assert {word for _, word in named} <= set(COMMANDS), named
    assert len(named) > 5


TYPED = [ROOT / "README.md", ROOT / "docs/install.md", ROOT / "docs/tracking.md"]
"""Pages whose commands can be typed as they stand."""


@pytest.mark.parametrize(
    "line", [line for page in TYPED for line in re.findall(r"^ilvr-ds .*", page.read_text(), re.MULTILINE)]
)
def test_the_readmes_commands_have_the_options_that_they_use(line: str) -> None:
    assert cli._parser().parse_args(shlex.split(line, comments=True)[1:])


def test_help_imports_nothing_heavy() -> None:
    """Catches a command whose file imports torch before the command runs."""
    script = (
        "import sys\nfrom ilvr_ds import cli\nimport atexit\natexit.register(lambda: print(*sys.modules))\ncli.main()"
    )
    ended = subprocess.run([sys.executable, "-c", script, "--help"], capture_output=True, text=True, check=False)
    assert ended.returncode == 0 and "demo-data" in ended.stdout
    heavy = {"torch", "transformers", "deepspeed", "mlflow", "numpy", "pandas", "matplotlib", "requests", "PIL"}
    assert heavy & set(ended.stdout.splitlines()[-1].split()) == set()


def test_a_module_records_the_command_that_it_stands_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches `__main__.py train ...` in the record of a run that torchrun started."""
    monkeypatch.setattr(cli, "run", lambda: None)
    monkeypatch.setattr(sys, "argv", ["/somewhere/ilvr_ds/cli/__main__.py", "train", "--config", "demo"])
    runpy.run_module("ilvr_ds.cli", run_name="__main__")
    assert provenance.command_line() == "ilvr-ds train --config demo"


def process(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "ilvr_ds.cli", *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=folder, timeout=120, check=False)


def test_a_process_says_a_mistake_in_one_line(tmp_path: Path) -> None:
    ended = process(tmp_path, "train", "--config", "none.yaml")
    assert (ended.returncode, ended.stdout) == (2, "")
    assert ended.stderr == "ilvr-ds: error: none.yaml: cannot read the recipe (No such file or directory)\n"


def test_a_command_that_trains_nothing_says_nothing_of_deepspeed(tmp_path: Path) -> None:
    """Catches a warning that there is no GPU, from a command that needs none."""
    ended = process(
        tmp_path,
        "plan",
        "--config",
        "demo",
        "--model",
        str(ROOT / "tests/golden/upstream-ilvr"),
        "--gpus",
        "2",
        "--gpu-memory",
        "80",
    )
    assert (ended.returncode, ended.stderr) == (0, "") and "fits: " in ended.stdout


def test_training_says_a_mistake_before_it_writes_anything(demo: Path, tmp_path: Path) -> None:
    ended = process(tmp_path, "train", *recipe(demo, f"data.shards={tmp_path}"))
    assert ended.returncode == 2 and "Traceback" not in ended.stderr
    assert ended.stderr.splitlines()[-1].startswith(f"ilvr-ds: error: {tmp_path}")
    assert not list(tmp_path.iterdir())


def test_a_process_ends_as_its_command_says_whatever_the_interpreters_end_would_do(tmp_path: Path) -> None:
    """Catches an end through the interpreter's shutdown, in which gloo's threads can abort a run that went well."""
    script = """
import atexit, os
from ilvr_ds import cli
from ilvr_ds.launcher import Place
class Bomb:
    def __del__(self): os.abort()
cli.bomb = Bomb()
atexit.register(print, "told")
cli.run(["inspect", "--config", "none.yaml"])
"""
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=tmp_path, check=False)
    assert (ended.returncode, ended.stdout) == (2, "told\n")


def test_an_interrupted_command_ends_in_one_line_and_by_the_signal() -> None:
    """A shell that runs commands in a loop goes on after a mere exit code."""
    script = """
from ilvr_ds import cli
def main(arguments):
    raise KeyboardInterrupt
cli.main = main
cli.run()
"""
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stdout, ended.stderr) == (-signal.SIGINT, "", "ilvr-ds: interrupted\n")


def test_a_tilde_that_no_shell_has_read_is_a_mistake(
    fails: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a folder of that name."""
    monkeypatch.chdir(tmp_path)
    assert fails("demo-data", "--output=~/demo").startswith("--output=~/demo: ~ is a shell's; write --output ~/demo")
    assert not list(tmp_path.iterdir())


def test_a_full_disk_is_one_line_for_every_command(fails: Run, tmp_path: Path) -> None:
    """Catches a traceback where a command does not see to it itself."""
    with files_end_at(100):
        line = fails("demo-data", "--output", tmp_path / "demo", "--train", "2", "--held-out", "1")
    assert line.startswith("demo-data: ") and "cannot be written (File too large)" in line


def test_a_reader_that_goes_away_ends_a_command_without_a_word() -> None:
    """As of `| head`: catches a traceback, in the command and at its end."""
    for count in (1, 100_000):
        script = f"""
from ilvr_ds import cli
def main(arguments):
    input()
    print("line\\n" * {count})
    return 0
cli.main = main
cli.run()
"""
        process = subprocess.Popen([sys.executable, "-c", script], stdin=PIPE, stdout=PIPE, stderr=PIPE, text=True)
        assert process.stdin and process.stdout and process.stderr
        process.stdout.close()
        process.stdin.write("\n")
        process.stdin.close()
        assert (process.wait(60), process.stderr.read()) == (-signal.SIGPIPE, "")
        process.stderr.close()


def test_every_letter_is_printed_and_closed_streams_are_no_fault(tmp_path: Path) -> None:
    """Catches a report that ends in a traceback where the locale has not its letters."""
    script = "from ilvr_ds import cli; cli.main = lambda arguments: print('\\u00e9') or 0; cli.run()"
    environment = os.environ | {"PYTHONIOENCODING": "ascii"}
    command = [sys.executable, "-c", script]
    ended = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "\\xe9\n", "")
    for line, code in (("{} >&- 2>&-", 0), ("ulimit -f 0; {} >out", 2)):
        shell = ["sh", "-c", line.format(shlex.join(command))]
        buffered = os.environ | {"PYTHONUNBUFFERED": ""}
        ended = subprocess.run(shell, capture_output=True, text=True, cwd=tmp_path, env=buffered, check=False)
        said = "ilvr-ds: error: standard output cannot be written (File too large)\n"
        assert (ended.returncode, ended.stderr) == (code, said if code else "")
