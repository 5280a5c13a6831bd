"""The `ilvr-ds` command: parses, wires, calls."""

from __future__ import annotations

import argparse
import atexit
import logging
import os
import sys
import time
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from ilvr_ds import __version__, launcher, shipped
from ilvr_ds.config import LIMITS, REQUIRED, Recipe, load_recipe
from ilvr_ds.errors import RunError, UserError

if TYPE_CHECKING:
    from ilvr_ds.evaluation.generate import GenerationSettings

logger = logging.getLogger("ilvr_ds")
USER_ERROR = 2
RUN_ERROR = 1
GRACE_S = 5.0
"""Other ranks wait this long before they print a user's mistake: the main rank's line is mostly the same."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code (2: a mistake that the user can mend, said in one line)."""
    options = _parser().parse_args(arguments)
    rank = 0
    try:
        if options.run in _BY_RANKS or getattr(options, "cluster", False):
            rank = launcher.find_place(os.environ).rank
        _set_up_logging(rank)
        _quieten_deepspeed(options.run is _train)
        if getattr(options, "config", None):
            options.config = shipped.find_recipe(options.config)
        return int(options.run(options))
    except UserError as error:
        if rank:
            time.sleep(GRACE_S)
        prefix = f"[rank {rank}] " if rank else ""
        print(f"{prefix}ilvr-ds: error: {error}", file=sys.stderr, flush=True)
        return USER_ERROR
    except RunError as error:
        print(f"[rank {rank}] ilvr-ds: error: {error}", file=sys.stderr, flush=True)
        return RUN_ERROR


def run(arguments: Sequence[str] | None = None) -> NoReturn:
    """`main` as a process, which ends without taking the interpreter apart.

    gloo's threads stay while anything knows their process group, and DeepSpeed does to the end; one that lets go of a
    tensor while the interpreter shuts down aborts the process, after a run that went well.
    """
    code = main(arguments)
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="ilvr-ds", description="Train interleaved latent visual reasoning.")
    parser.add_argument("--version", action="version", version=f"ilvr_ds {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    pack = commands.add_parser("pack", help="JSON Lines and images to webdataset shards with a checked index")
    pack.add_argument("--input", type=Path, required=True, help="JSON Lines file")
    pack.add_argument("--image-root", type=Path, help="folder of the image paths (default: the input's folder)")
    pack.add_argument("--output", type=Path, required=True, help="folder to write")
    pack.add_argument("--format", choices=["auto", "ilvr", "mirage"], default="auto")
    pack.add_argument("--config", type=Path, help="recipe: measure samples, reject those above data.max_tokens")
    pack.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override a key of the recipe")
    pack.add_argument("--overwrite", action="store_true", help="replace a data set at --output")
    pack.set_defaults(run=_pack)

    encode = commands.add_parser("encode", help="store a data set's vision features; goes on where it was killed")
    encode.add_argument("--config", type=Path, help="recipe whose data, model, image settings and precision are used")
    encode.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override a key of the recipe")
    encode.add_argument("--shards", help="data set that `pack` wrote (default: the recipe's data.shards)")
    encode.add_argument("--model", help="folder or hub name (default: the recipe's model.path)")
    encode.add_argument("--output", type=Path, help="folder to write (default: SHARDS/features)")
    encode.add_argument("--precision", choices=["bf16", "fp32", "fp16"], help="of the tower (default: train.precision)")
    encode.add_argument("--max-image-pixels", type=int, help="(default: data.max_image_pixels)")
    encode.add_argument("--part", default="0/1", metavar="I/N", help="every N-th shard from I on, I from 0 to N-1")
    encode.add_argument("--workers", type=int, default=2, help="processes that decode images (default 2)")
    encode.add_argument("--batch-patches", type=int, default=16384, help="patches at a time (default 16384)")
    encode.set_defaults(run=_encode)

    inspect = commands.add_parser("inspect", help="print a sample as the model sees it")
    inspect.add_argument("--config", type=Path, required=True, help="recipe whose model and data.shards are used")
    inspect.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override a key of the recipe")
    inspect.add_argument("--sample", type=int, default=0, help="number of the sample in the data set (default 0)")
    inspect.set_defaults(run=_inspect)

    train = commands.add_parser("train", help="train; alone it is one rank, launchers start several")
    train.add_argument("--config", type=Path, required=True, help="recipe: a YAML file, or the name of one of ours")
    train.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override a key of the recipe")
    train.add_argument("--resume", metavar="auto|must|never|PATH", help="the same as --set checkpoint.resume=...")
    train.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # the deepspeed launcher adds it
    train.set_defaults(run=_train)

    plan = commands.add_parser("plan", help="memory and least time of a recipe, and which recipes fit")
    plan.add_argument("--model", metavar="7b|3b|FOLDER", help="whose sizes are taken (default: the recipe's)")
    plan.add_argument("--gpus", type=int, required=True, help="ranks, one a GPU")
    plan.add_argument(
        "--gpu-memory", type=float, required=True, metavar="SIZE",
        help="of each GPU: what the card is named by (80: it has 79.2 GiB), or GiB as `doctor` says them",
    )  # fmt: skip
    plan.add_argument("--chip", help="its peaks bound the time (default: H100 up to 100 GiB, else H200)")
    plan.add_argument("--config", type=Path, help="one recipe in detail (default: a line for each of ours)")
    plan.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override a key of the recipe")
    plan.add_argument("--tokens", type=int, default=1030, help="of a typical sample (default 1030)")
    plan.add_argument("--labels", type=int, default=280, help="of these supervised (default 280)")
    plan.add_argument("--patches", type=int, default=5376, help="of its images, before merging (default 5376)")
    plan.set_defaults(run=_plan)

    sync = commands.add_parser("mlflow-sync", help="send to MLflow what a run could not send while it ran")
    sync.add_argument("directory", type=Path, metavar="RUN_DIR", help="folder of the run")
    sync.add_argument("--uri", help="tracking address instead of the run's own")
    sync.set_defaults(run=_mlflow_sync)

    ui = commands.add_parser("ui", help="start MLflow's pages on this machine and say where the charts are")
    ui.add_argument(
        "directory", type=Path, nargs="?", default=Path("outputs"), metavar="FOLDER",
        help="folder of the runs, or of one run (default outputs)",
    )  # fmt: skip
    ui.add_argument("--experiment", help="whose charts (default: that of the newest run)")
    ui.add_argument("--port", type=int, default=5000, help="on 127.0.0.1 (default 5000)")
    ui.set_defaults(run=_ui)

    compare = commands.add_parser("compare", help="runs side by side: settings that differ and last metrics")
    compare.add_argument("runs", type=Path, nargs="+", metavar="RUN_DIR", help="folder of a run")
    compare.set_defaults(run=_compare)

    generate = commands.add_parser("generate", help="answer a question with a trained model")
    _add_generation(generate)
    generate.add_argument("--image", type=Path, action="append", default=[], help="input image; may be given again")
    generate.add_argument("--question", required=True, help="may hold <image> where the images stand")
    generate.add_argument("--tracking-uri", default=os.environ.get("MLFLOW_TRACKING_URI"), help="MLflow of models:/")
    generate.set_defaults(run=_generate)

    evaluate = commands.add_parser("evaluate", help="answer and score a packed data set; goes on where it was killed")
    _add_generation(evaluate)
    evaluate.add_argument("--shards", required=True, help="data set that `pack` wrote")
    evaluate.add_argument("--benchmark", required=True, help="comt, vsp or exact-match")
    evaluate.add_argument("--output", type=Path, help="folder to write (default: MODEL/evaluation/BENCHMARK)")
    evaluate.add_argument("--batch-size", type=int, default=16, help="answers at a time on each rank (default 16)")
    evaluate.add_argument("--max-samples", type=int, help="the first so many samples (default: all)")
    evaluate.add_argument("--ablate-latents", action="store_true", help="again with other latents, and with none")
    evaluate.add_argument(
        "--compare-pixels", type=int, default=0, metavar="N", help="cost against helper images as pixels, on N answers"
    )
    evaluate.add_argument("--tracking-uri", default=os.environ.get("MLFLOW_TRACKING_URI"), help="MLflow for the scores")
    evaluate.add_argument("--experiment", help="MLflow experiment (default: below the training run, else evaluation)")
    evaluate.set_defaults(run=_evaluate)

    export = commands.add_parser("export", help="a run's weights as a model that stock transformers loads")
    export.add_argument("source", type=Path, metavar="RUN_OR_CHECKPOINT", help="folder of a run or of a checkpoint")
    export.add_argument("--to", type=Path, required=True, help="folder to write")
    export.add_argument("--adapters", choices=["merge", "apart"], default="merge", help="LoRA (default merge)")
    export.add_argument("--precision", choices=["fp32", "bf16", "fp16"], help="of the weights (default: the run's)")
    export.add_argument("--register", metavar="NAME", help="make it the next version of this model in MLflow")
    export.add_argument("--tracking-uri", help="MLflow for --register (default: the run's)")
    export.add_argument("--overwrite", action="store_true", help="replace a model at --to")
    export.set_defaults(run=_export)

    demo = commands.add_parser("demo-data", help="draw the demo task and build a tiny random model for it")
    demo.add_argument("--output", type=Path, required=True, help="folder to write")
    demo.add_argument("--train", type=int, default=1024, help="training samples (default 1024)")
    demo.add_argument("--held-out", type=int, default=128, help="held-out samples (default 128)")
    demo.add_argument("--grid", type=int, default=4, help="cells of a side of the pictures: 4, 6 or 8 (default 4)")
    demo.add_argument(
        "--operations", nargs="+", metavar="NAME", default=["creation", "deletion", "update", "selection"],
        help="what to draw, in turn: creation, deletion, update, selection (the default), trail",
    )  # fmt: skip
    demo.add_argument("--signs", type=int, help="signs of a trail (default 6)")
    demo.add_argument(
        "--size", choices=["tiny", "mini", "medium", "small"], default="tiny", help="size of the model (default tiny)"
    )
    demo.add_argument("--seed", type=int, default=0)
    demo.add_argument("--workers", type=int, default=1, help="processes that draw (default 1)")
    demo.set_defaults(run=_demo_data)

    doctor = commands.add_parser("doctor", help="what this machine has, what is missing, how to get it")
    doctor.add_argument("--cluster", action="store_true", help="compare all ranks; start it as you start train")
    doctor.add_argument("--shards", help="data set to check, every byte; with --cluster every rank reads a part")
    doctor.set_defaults(run=_doctor)
    return parser


def _pack(options: argparse.Namespace) -> int:
    from tqdm import tqdm

    from ilvr_ds.ingest.pack import pack

    recipe = _recipe_if_given(options)
    measure, measured_with = None, None
    if recipe:
        from ilvr_ds.model.encoding import build_encoding

        measure = build_encoding(recipe).encoder.count_tokens
        keys = ("model.path", "model.latent_size", "data.max_image_pixels")
        measured_with = {key: recipe.flat()[key] for key in keys}
    with tqdm(unit=" samples", disable=None, desc="packing") as bar:

        def progress(done: int, rejected: int, size: int) -> None:
            bar.set_postfix(rejected=rejected, MB=size // 10**6, refresh=False)
            bar.update(done - bar.n)

        report = pack(
            options.input,
            options.image_root or options.input.parent,
            options.output,
            format=options.format,
            measure=measure,
            measured_with=measured_with,
            max_tokens=recipe.data.max_tokens if recipe else None,
            overwrite=options.overwrite,
            progress=progress,
        )
    print("\n".join(report.lines()))
    return 0


def _encode(options: argparse.Namespace) -> int:
    from tqdm import tqdm

    from ilvr_ds import dist
    from ilvr_ds.model.feature_pass import EncodeSettings, encode, parse_part

    recipe = _recipe_if_given(options) or Recipe()
    if options.workers < 0 or options.batch_patches < 1:
        raise UserError("--workers must be 0 or more, --batch-patches 1 or more")
    _check_pixels(options)
    settings = EncodeSettings(
        shards=options.shards or recipe.data.shards,
        model=replace(recipe.model, path=options.model or recipe.model.path),
        precision=options.precision or recipe.train.precision,
        max_image_pixels=options.max_image_pixels or recipe.data.max_image_pixels,
        blank_images=recipe.data.blank_images,
        output=options.output,
        part=parse_part(options.part),
        workers=options.workers,
        batch_patches=options.batch_patches,
    )
    if REQUIRED in (settings.shards, settings.model.path):
        raise UserError("encode: give --shards and --model, or a recipe by --config")
    with tqdm(unit=" samples", disable=None, desc="encoding") as bar:

        def progress(done: int, total: int, size: int) -> None:
            bar.total = total
            bar.set_postfix(MB=size // 10**6, refresh=False)
            bar.update(done - bar.n)

        lines = encode(settings, dist.device(), progress)
    print("\n".join(lines))
    return 0


def _inspect(options: argparse.Namespace) -> int:
    from ilvr_ds.data.describe import describe_sample
    from ilvr_ds.data.reader import ShardReader
    from ilvr_ds.data.sample import SampleError
    from ilvr_ds.data.shards import open_dataset
    from ilvr_ds.model.encoding import build_encoding

    recipe = _recipe(options)
    encoding = build_encoding(recipe)
    reader = ShardReader(open_dataset(recipe.data.shards))
    if not 0 <= options.sample < len(reader):
        raise UserError(f"--sample {options.sample}: the data set has samples 0 to {len(reader) - 1}")
    try:
        lines = describe_sample(reader.read(options.sample), encoding.encoder, encoding.layout.merge_size)
    except SampleError as error:
        raise UserError(f"sample {options.sample} of {reader.location}: {error}") from error
    print("\n".join(lines))
    return 0


def _train(options: argparse.Namespace) -> int:
    if options.resume:
        options.set.append(f"checkpoint.resume={options.resume}")
    recipe = _recipe(options)
    from ilvr_ds.training.run import train

    return train(recipe, options.config)


def _plan(options: argparse.Namespace) -> int:
    from ilvr_ds.engine.settings import read_deepspeed_json
    from ilvr_ds.model.student import load_config
    from ilvr_ds.planning.command import PlanOptions, plan
    from ilvr_ds.planning.setup import SampleSize

    settings = PlanOptions(
        model=options.model,
        gpus=options.gpus,
        gpu_memory=options.gpu_memory,
        chip=options.chip,
        config=options.config,
        overrides=tuple(options.set),
        sample=SampleSize(options.tokens, options.labels, options.patches),
    )
    print("\n".join(plan(settings, shipped.recipes(), load_config, read_deepspeed_json)))
    return 0


def _mlflow_sync(options: argparse.Namespace) -> int:
    from ilvr_ds.tracking.mlflow_sync import sync

    for line in sync(options.directory, options.uri):
        print(line)
    return 0


def _ui(options: argparse.Namespace) -> int:
    from ilvr_ds.tracking.ui import show

    return show(options.directory, options.experiment, options.port, lambda line: print(line, flush=True))


def _compare(options: argparse.Namespace) -> int:
    from ilvr_ds.tracking.compare import compare

    print("\n".join(compare(options.runs)))
    return 0


def _add_generation(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--model", required=True, help="folder that `export` wrote, a released model, or models:/NAME/VERSION"
    )
    command.add_argument("--latent-size", type=int, help="latent steps of a segment (default: the model's)")
    command.add_argument("--precision", choices=["auto", "fp32", "bf16", "fp16"], default="auto")
    command.add_argument("--max-image-pixels", type=int, help="of an image (default: the model's, which export sets)")
    command.add_argument("--max-new-tokens", type=int, default=1024, help="latent steps included (default 1024)")
    command.add_argument("--temperature", type=float, default=0.0, help="0 is greedy (default)")
    command.add_argument("--top-p", type=float, default=1.0)
    command.add_argument("--seed", type=int, default=0)
    command.add_argument("--stop", action="append", default=[], metavar="TEXT", help="end after this text")


def _generation_settings(options: argparse.Namespace) -> GenerationSettings:
    from ilvr_ds.evaluation.generate import GenerationSettings

    if options.max_new_tokens < 1 or options.temperature < 0 or not 0 < options.top_p <= 1:
        raise UserError("--max-new-tokens must be 1 or more, --temperature 0 or more, --top-p above 0 and at most 1")
    if "" in options.stop:
        raise UserError("--stop: is empty; give a text, or leave it out")
    if options.seed < 0:
        raise UserError(f"--seed {options.seed}: must be 0 or more")
    _check_pixels(options)
    return GenerationSettings(
        options.max_new_tokens, options.temperature, options.top_p, options.seed, tuple(options.stop)
    )


def _generate(options: argparse.Namespace) -> int:
    from ilvr_ds import dist
    from ilvr_ds.data.sample import SampleError
    from ilvr_ds.evaluation.generate import Generator
    from ilvr_ds.evaluation.loading import load_reasoner
    from ilvr_ds.evaluation.question import ask
    from ilvr_ds.tracking.registry import find_model

    settings = _generation_settings(options)
    sample = ask(options.question, options.image)
    model = find_model(options.model, options.tracking_uri)
    reasoner = load_reasoner(model, dist.device(), options.precision, options.latent_size, options.max_image_pixels)
    stream = Generator(reasoner, settings, on_text=lambda row, piece: print(piece, end="", flush=True))
    try:
        prompt = reasoner.encoder.prompt(sample)
    except SampleError as error:
        raise UserError(f"--question: {error}") from error
    generated = stream([prompt])
    print()
    logger.info("%s", generated.summary())
    return 0


def _evaluate(options: argparse.Namespace) -> int:
    from ilvr_ds.evaluation.evaluate import EvaluationSettings, evaluate

    settings = EvaluationSettings(
        model=options.model,
        shards=options.shards,
        benchmark=options.benchmark,
        output=options.output,
        batch_size=options.batch_size,
        max_samples=options.max_samples,
        latent_size=options.latent_size,
        precision=options.precision,
        max_image_pixels=options.max_image_pixels,
        ablate_latents=options.ablate_latents,
        compare_pixels=options.compare_pixels,
        generation=_generation_settings(options),
        tracking_uri=options.tracking_uri,
        experiment=options.experiment,
    )
    lines = evaluate(settings)
    if os.environ.get("RANK", "0") == "0":
        print("\n".join(lines))
    return 0


def _export(options: argparse.Namespace) -> int:
    from ilvr_ds.evaluation.export import export

    if options.register is not None:
        from ilvr_ds.tracking.registry import check_name
        from ilvr_ds.tracking.scores import check_address

        check_name(options.register)
        if options.tracking_uri:
            check_address(options.tracking_uri, "--tracking-uri")
    lines = export(options.source, options.to, options.adapters, options.precision, options.overwrite)
    if options.register:
        from ilvr_ds.tracking.registry import register

        try:
            lines.append(f"registered as {register(options.to, options.register, options.tracking_uri)}")
        except UserError as error:
            raise UserError(f"{error} (the model is whole in {options.to})") from error
    print("\n".join(lines))
    return 0


def _demo_data(options: argparse.Namespace) -> int:
    from ilvr_ds.demo.material import write_demo

    for line in write_demo(
        options.output, options.train, options.held_out, options.grid, options.size, options.seed, options.workers,
        options.operations, options.signs,
    ):  # fmt: skip
        print(line)
    return 0


def _doctor(options: argparse.Namespace) -> int:
    from ilvr_ds import doctor

    if options.cluster:
        from ilvr_ds import cluster, dist

        rows, checks = cluster.examine(options.shards)
        if dist.is_main():
            print("\n".join(rows))
            print(doctor.render(checks))
        dist.barrier()
        dist.close()
    else:
        checks = [*doctor.report(), *([doctor.check_shards(options.shards)] if options.shards else [])]
        print(doctor.render(checks))
    return int(any(check.status == "bad" for check in checks))


_BY_RANKS = (_train, _evaluate)
"""Commands that launchers start several times."""


def _recipe(options: argparse.Namespace) -> Recipe:
    return load_recipe(options.config, options.set)


def _recipe_if_given(options: argparse.Namespace) -> Recipe | None:
    if options.set and not options.config:
        raise UserError(f"--set {options.set[0]}: overrides a key of a recipe; give one by --config")
    return _recipe(options) if options.config else None


def _check_pixels(options: argparse.Namespace) -> None:
    least, most = LIMITS["data.max_image_pixels"]
    if options.max_image_pixels is not None and not least <= options.max_image_pixels <= most:
        raise UserError(f"--max-image-pixels {options.max_image_pixels}: must be from {least} to {most}")


def _set_up_logging(rank: int) -> None:
    """Plain lines on standard error: everything from the main rank, warnings with their rank from the others."""
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(message)s" if rank == 0 else f"[rank {rank}] %(message)s"))
    logger.addHandler(handler)
    logger.setLevel(logging.INFO if rank == 0 else logging.WARNING)
    logger.propagate = False
    # deprecation notices between torch, transformers and DeepSpeed are nothing that a user can act on
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")


def _quieten_deepspeed(trains: bool) -> None:
    """Its warnings concern who trains alone; that it found no GPU is said of the ranks, and by `doctor`."""
    least = logging.WARNING if trains else logging.ERROR
    logging.getLogger("DeepSpeed").addFilter(
        lambda record: record.levelno >= least and not record.getMessage().startswith("Setting accelerator to CPU")
    )


if __name__ == "__main__":
    run()
