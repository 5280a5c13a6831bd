"""Data sets: `pack`, `encode`, `inspect`."""

from __future__ import annotations

import argparse
import logging
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ilvr_ds.cli.options import Commands, add_command, add_recipe, check_max_image_pixels, recipe_if_given, recipe_of
from ilvr_ds.config import REQUIRED, Recipe
from ilvr_ds.errors import UserError

logger = logging.getLogger("ilvr_ds")

if TYPE_CHECKING:
    from ilvr_ds.model.feature_pass import EncodeSettings


FORMATS = ["auto", "ilvr", "mirage", "comt", "zebra-cot", "monet", "lvr", "visual-cot", "conversations"]


def add_pack(commands: Commands) -> None:
    """The options of `pack`."""
    command = add_command(
        commands, "pack", "records and images to webdataset shards with a checked index", "formats.md"
    )
    command.add_argument(
        "--input", required=True, help="JSON Lines, JSON array (or .gz, .zst), parquet, tar, folder or hf:OWNER/NAME"
    )
    command.add_argument("--image-root", type=Path, help="folder of the image paths (default: the input's folder)")
    command.add_argument("--output", type=Path, required=True, help="folder to write")
    command.add_argument(
        "--format", choices=FORMATS, default="auto", help="what keys mean (default auto: told by the first record)"
    )
    command.add_argument(
        "--helper",
        choices=["crop", "region"],
        default="crop",
        help="what a box makes: its part (default), or the whole with it",
    )
    command.add_argument("--subset", help="configuration of a Hugging Face data set")
    command.add_argument("--split", help="split of a Hugging Face data set (default: the only one)")
    add_recipe(command, "recipe: measure samples, reject those above data.max_tokens")
    command.add_argument("--overwrite", action="store_true", help="replace a data set at --output")
    command.set_defaults(run=_pack)


def _pack(options: argparse.Namespace) -> int:
    from tqdm import tqdm

    from ilvr_ds.ingest.pack import pack

    recipe = recipe_if_given(options)
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
            options.image_root or _image_root(options.input),
            options.output,
            format=options.format,
            helper=options.helper,
            subset=options.subset,
            split=options.split,
            measure=measure,
            measured_with=measured_with,
            max_tokens=recipe.data.max_tokens if recipe else None,
            overwrite=options.overwrite,
            progress=progress,
            tell=logger.info,
        )
    print("\n".join(report.lines()))
    return 0


def _image_root(input: str) -> Path:
    """The input's folder; for a data set on the hub, whose images rarely are files, the present one."""
    path = Path(input)
    return path if path.is_dir() else path.parent if path.exists() else Path()


def add_encode(commands: Commands) -> None:
    """The options of `encode`."""
    command = add_command(
        commands, "encode", "store a data set's vision features; resumes where it was killed", "data.md"
    )
    add_recipe(command, "recipe whose data, model, image settings and precision are used")
    command.add_argument("--shards", help="data set that `pack` wrote (default: the recipe's data.shards)")
    command.add_argument("--model", help="folder or hub name (default: the recipe's model.path)")
    command.add_argument("--output", type=Path, help="folder to write (default: SHARDS/features)")
    command.add_argument(
        "--precision", choices=["bf16", "fp32", "fp16"], help="of the tower (default: train.precision)"
    )
    command.add_argument("--max-image-pixels", type=int, help="(default: data.max_image_pixels)")
    command.add_argument("--part", default="0/1", metavar="I/N", help="every N-th shard from I on, I from 0 to N-1")
    command.add_argument("--workers", type=int, default=2, help="processes that decode images (default 2)")
    command.add_argument("--batch-patches", type=int, default=16384, help="patches at a time (default 16384)")
    command.set_defaults(run=_encode)


def _encode(options: argparse.Namespace) -> int:
    from tqdm import tqdm

    from ilvr_ds import dist
    from ilvr_ds.model.feature_pass import encode

    for settings in _encode_settings(options):
        with tqdm(unit=" samples", disable=None, desc="encoding") as bar:

            def progress(done: int, total: int, size: int, bar: Any = bar) -> None:
                bar.total = total
                bar.set_postfix(MB=size // 10**6, refresh=False)
                bar.update(done - bar.n)

            lines = encode(settings, dist.device(), progress)
        print("\n".join(lines))
    return 0


def _encode_settings(options: argparse.Namespace) -> list[EncodeSettings]:
    """One for each data set: those of a mixture one after the other."""
    from ilvr_ds.model.feature_pass import EncodeSettings, parse_part

    recipe = recipe_if_given(options) or Recipe()
    if options.workers < 0 or options.batch_patches < 1:
        raise UserError("--workers must be 0 or more, --batch-patches 1 or more")
    check_max_image_pixels(options)
    paths = [options.shards] if options.shards else [entry.path for entry in recipe.data.sets]
    if options.output is not None and len(paths) > 1:
        raise UserError("--output: data.shards is a mixture; give the data set by --shards, or leave --output out")
    settings = EncodeSettings(
        shards=paths[0],
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
    return [replace(settings, shards=path) for path in paths]


def add_inspect(commands: Commands) -> None:
    """The options of `inspect`."""
    command = add_command(commands, "inspect", "print a sample as the model sees it", "data.md")
    add_recipe(command, "recipe whose model and data.shards are used", required=True)
    command.add_argument("--sample", type=int, default=0, help="number of the sample in the data set (default 0)")
    command.set_defaults(run=_inspect)


def _inspect(options: argparse.Namespace) -> int:
    from ilvr_ds.data.describe import describe_sample
    from ilvr_ds.data.mixture import Mixture, MixtureReader
    from ilvr_ds.data.sample import SampleError
    from ilvr_ds.model.encoding import build_encoding

    recipe = recipe_of(options)
    encoding = build_encoding(recipe)
    reader = MixtureReader(Mixture.open(recipe.data.sets))
    if not 0 <= options.sample < len(reader):
        raise UserError(f"--sample {options.sample}: the data set has samples 0 to {len(reader) - 1}")
    try:
        lines = describe_sample(reader.read(options.sample), encoding.encoder, encoding.layout.merge_size)
    except SampleError as error:
        raise UserError(f"sample {options.sample} of {reader.location}: {error}") from error
    print("\n".join(lines))
    return 0
