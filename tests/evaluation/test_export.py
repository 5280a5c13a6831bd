from __future__ import annotations

import os
import shutil
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, Qwen2_5_VLForConditionalGeneration

from ilvr_ds.cli import main
from ilvr_ds.errors import UserError
from ilvr_ds.generation.loading import load_reasoner
from ilvr_ds.model.layers import four_bit
from ilvr_ds.model.layers.four_bit import pack_layers, weight_of
from tests.evaluation.exporting import abandoned, export_base
from tests.ranks import ROOT, run_ranks
from tests.recipes import RECIPE
from tests.stores import with_tables


def train(demo: Path, folder: Path, *changes: str) -> Any:
    overrides = [
        f"run.output_dir={with_tables(folder)}", f"data.shards={demo / 'train'}", "data.eval_shards=null",
        f"model.path={demo / 'model'}", "train.max_steps=2", "train.micro_batch_size=4", "optim.warmup_steps=0",
        "checkpoint.every_steps=0", "tracking.picture_samples=0", *changes,
    ]  # fmt: skip
    worker = "tests.distributed.workers_run:train_unrehearsed"
    return run_ranks(worker, 2, folder / "ranks", recipe=RECIPE, overrides=overrides)[0]


def load(folder: Path) -> Any:
    model, info = Qwen2_5_VLForConditionalGeneration.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"], info
    return model


@pytest.mark.parametrize("stage", [3, 2])
def test_an_export_is_exactly_what_the_ranks_held(demo_folder: Path, tmp_path: Path, stage: int) -> None:
    limit = "data.max_image_pixels=50176"
    result = train(demo_folder, tmp_path, f"deepspeed.config={ROOT}/ds_configs/zero{stage}.json", limit)
    assert main(["export", f"{tmp_path / 'demo'}", "--to", f"{tmp_path / 'model'}"]) == 0
    model, base = load(tmp_path / "model"), load(demo_folder / "model")
    weights = model.state_dict()
    trained = {name.removeprefix("model."): value for name, value in result["weights"].items()}
    assert not torch.equal(weights["lm_head.weight"], base.state_dict()["lm_head.weight"]), "training must change it"
    for name, value in weights.items():
        expected = base.state_dict()[name] if "visual" in name else trained.pop(name)
        assert torch.equal(value, expected), name
    assert not trained
    special = load_reasoner(str(tmp_path / "model"), torch.device("cpu")).special
    config = model.config
    assert (config.latent_size, config.latent_start_id) == (4, special.latent_start)
    assert "<|latent_pad|>" in AutoTokenizer.from_pretrained(tmp_path / "model").get_vocab()
    card = (tmp_path / "model/README.md").read_text()
    assert '"max_steps": 2' in card and "optimizer steps: 2" in card and "pip install torchvision" in card
    assert not list(tmp_path.glob("*.partial*"))
    assert load_reasoner(str(tmp_path / "model"), torch.device("cpu")).encoder.images.max_pixels == 50_176


def test_overwriting_replaces_a_model_and_nothing_else(
    demo_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches an export that takes its own run, or a folder of something else, for a model to replace; and scores of a
    killed run that end it: a NaN, and a line that was being written."""
    train(demo_folder, tmp_path)
    run = tmp_path / "demo"
    with (run / "metrics.jsonl").open("a") as record:
        record.write('{"step": 2, "time": 1, "metrics": {"eval/ce": "nan"}}\n{"step": 2, "ti')
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious/thesis.txt").write_text("x")
    (tmp_path / "file").write_text("x")
    for to, words in (
        (run, "holds the checkpoint that is to be exported"),
        (tmp_path / "precious", "holds something other than an exported model"),
        (tmp_path / "file", "is a file; give a folder"),
    ):
        assert main(["export", f"{run}", "--to", f"{to}", "--overwrite"]) == 2
        assert words in capsys.readouterr().err
    assert (tmp_path / "precious/thesis.txt").exists() and (run / "checkpoints").exists()
    for _ in range(2):
        assert main(["export", f"{run}", "--to", f"{tmp_path / 'model'}", "--overwrite"]) == 0
    (tmp_path / "model/evaluation").mkdir()
    assert main(["export", f"{run}", "--to", f"{tmp_path / 'model'}", "--overwrite"]) == 2
    assert "holds scores of the model there" in capsys.readouterr().err
    assert "- ce: nan" in (tmp_path / "model/README.md").read_text()


@pytest.mark.parametrize("base", ["full", "nf4"])
def test_adapters_merged_or_apart(
    demo_folder: Path, tmp_path: Path, base: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Base with the adapters beside it, put together by peft, computes what the merged weights compute; a base that was
    in 4 bits is what it was multiplied with, not what the files say."""
    from peft import PeftModel

    train(demo_folder, tmp_path, "model.lora_rank=4", f"model.lora_base={base}", "optim.lr=0.05")
    for how in ("merge", "apart"):
        assert main(["export", f"{tmp_path / 'demo'}", "--to", f"{tmp_path / how}", "--adapters", how]) == 0
    merged, apart, plain = load(tmp_path / "merge"), load(tmp_path / "apart"), load(demo_folder / "model")
    if base == "nf4":
        pack_layers(plain.model.language_model, lambda _: nullcontext(), torch.device("cpu"))
    for name, value in apart.state_dict().items():
        assert torch.equal(value, weight_of(plain, name)), name
    ids = torch.arange(20)[None]
    before = apart(input_ids=ids).logits
    together = PeftModel.from_pretrained(apart, str(tmp_path / "apart/adapter"))(input_ids=ids).logits
    torch.testing.assert_close(together, merged(input_ids=ids).logits, atol=1e-4, rtol=1e-4)
    assert (together - before).abs().max() > 1e-2
    if base == "nf4":
        monkeypatch.setattr(four_bit, "find_spec", lambda _: None)
        assert main(["export", f"{tmp_path / 'demo'}", "--to", f"{tmp_path / 'other'}"]) == 2
        assert "model.lora_base is nf4: needs bitsandbytes" in capsys.readouterr().err
        assert not (tmp_path / "other").exists()


def test_peft_opens_adapters_and_their_base_by_itself(
    golden_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From any working directory: the base was named `..`."""
    from peft import AutoPeftModel

    lora = ("model.lora_rank=4",)
    merged = export_base(golden_model, tmp_path / "merged", monkeypatch, *lora, random=True)
    apart = export_base(golden_model, tmp_path / "apart", monkeypatch, *lora, adapters="apart", random=True)
    monkeypatch.chdir(tmp_path)
    together = AutoPeftModel.from_pretrained("apart/adapter", dtype=torch.float32)
    ids = torch.arange(20)[None]
    logits = together(input_ids=ids).logits
    torch.testing.assert_close(logits, load(merged)(input_ids=ids).logits, atol=1e-5, rtol=1e-5)
    assert (logits - load(apart)(input_ids=ids).logits).abs().max() > 1e-2


def test_two_exports_to_one_folder_do_not_meet(
    golden_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Catches an export that deletes what the other has written so far, one that replaces it without being told, and
    what a killed one leaves for ever."""
    from ilvr_ds.evaluation import export as module

    export_base(golden_model, tmp_path / "first", monkeypatch)
    checkpoint, to = tmp_path / "run/checkpoints/step-00000002", tmp_path / "model"
    write_card, started = module.write_card, []
    killed = abandoned(tmp_path / "model.partial-0123abcd")

    def meanwhile(*arguments: Any) -> None:
        if not started:
            started.append(checkpoint)
            module.export(checkpoint, to, "merge", None, overwrite=False)
        write_card(*arguments)

    monkeypatch.setattr(module, "write_card", meanwhile)
    with pytest.raises(UserError, match="model is not empty; give another folder or --overwrite"):
        module.export(checkpoint, to, "merge", None, overwrite=False)
    assert sorted(path.name for path in to.iterdir()) == sorted(path.name for path in (tmp_path / "first").iterdir())
    assert not list(tmp_path.glob("model.*")), "the slower one leaves nothing"
    assert "which was killed or still runs; if it does not: rm -r" in caplog.text
    assert f"{killed}: removed; process " in caplog.text


def test_a_damaged_checkpoint_is_not_exported(
    golden_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Catches a flipped bit that goes into the model in silence; of a run the checkpoint before is taken."""
    from ilvr_ds.evaluation import export as module

    export_base(golden_model, tmp_path / "first", monkeypatch)
    whole = tmp_path / "run/checkpoints/step-00000002"
    torn = shutil.copytree(whole, whole.with_name("step-00000003"))
    (torn / "state.json").write_text((whole / "state.json").read_text().replace('"step": 2', '"step": 3'))
    with pytest.raises(UserError, match=r"step-00000003/state\.json: damaged .*; take another checkpoint"):
        module.export(torn, tmp_path / "second", "merge", None, overwrite=False)
    (line,) = module.export(tmp_path / "run", tmp_path / "second", "merge", None, overwrite=False)
    assert ": step 2 of run" in line and "looking at the checkpoint before it" in caplog.text


@pytest.mark.parametrize("umask", [0o022, 0o027])
def test_others_may_read_an_export_as_the_umask_says(
    golden_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, umask: int
) -> None:
    """safetensors writes 0600 whatever the umask is."""
    before = os.umask(umask)
    try:
        written = export_base(golden_model, tmp_path / "model", monkeypatch, "model.lora_rank=4", adapters="apart")
    finally:
        os.umask(before)
    files = [path for path in written.rglob("*") if path.is_file()]
    assert len([file for file in files if file.suffix == ".safetensors"]) == 2
    assert {oct(file.stat().st_mode & 0o777) for file in files} == {oct(0o666 & ~umask)}


def test_mistakes(demo_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", f"{tmp_path}", "--to", f"{tmp_path / 'm'}"]) == 2
    assert "is neither a run nor a checkpoint" in capsys.readouterr().err
    assert not (tmp_path / "m").exists()
