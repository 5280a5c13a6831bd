"""A sample as the model sees it, in words for a terminal."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby
from typing import Any

from ilvr_ds.data.decode import decode_image
from ilvr_ds.data.sample import LatentStep, Sample
from ilvr_ds.data.template import IGNORE, EncodedSample, SampleEncoder


def describe_sample(sample: Sample, encoder: SampleEncoder, merge_size: int) -> list[str]:
    """Lines: identity, images, then the sequence piece by piece with positions, labels and latent spans."""
    encoded = encoder(sample)
    supervised = int((encoded.labels != IGNORE).sum())
    lines = [
        f"id        {sample.id}",
        f"group     {sample.group or '-'}",
        f"answer    {sample.answer or '-'}",
        f"tokens    {len(encoded.input_ids)}, of which {supervised} supervised",
        f"segments  {len(encoded.segments)}, {encoder.latent_size} latent slots each",
        *_image_lines(sample, encoded, merge_size),
        "",
        f"{'tokens':>13}  {'mRoPE (t, h, w)':<26} {'label':<6} content",
    ]
    return lines + list(_sequence_lines(encoded, encoder))


def _image_lines(sample: Sample, encoded: EncodedSample, merge_size: int) -> Iterator[str]:
    images = (*sample.input_images, *sample.helper_images)[: len(encoded.grids)]  # helpers may not be encoded
    regions = [step.region for step in sample.steps if isinstance(step, LatentStep)]
    for number, (data, (rows, columns)) in enumerate(zip(images, encoded.grids, strict=True)):
        is_input = number < encoded.num_input_images
        name = f"input {number}" if is_input else f"helper {number - encoded.num_input_images}"
        width, height = decode_image(data).size
        count = rows * columns // merge_size**2
        region = None if is_input else regions[number - encoded.num_input_images]
        box = "" if region is None else f", region {list(region)}"
        yield f"{name:<9} {width}x{height} pixels, {columns}x{rows} patches, {count} merged features{box}"


def _sequence_lines(encoded: EncodedSample, encoder: SampleEncoder) -> Iterator[str]:
    """One line for each run of tokens of the same kind and supervision."""

    def kind(t: int) -> tuple[str, bool, bool]:
        token = int(encoded.input_ids[t])
        special = {encoder.special.image_pad: "image", encoder.special.latent_pad: "latent"}.get(token, "text")
        return special, bool(encoded.labels[t] != IGNORE), encoded.answer[0] <= t < encoded.answer[1]

    for (what, is_label, is_answer), run in groupby(range(len(encoded.input_ids)), key=kind):
        positions = list(run)
        first, last = positions[0], positions[-1]
        start, end = (tuple(int(x) for x in encoded.position_ids[:, t]) for t in (first, last))
        where = f"{start}" if first == last else f"{start}..{end}"
        content: Any = f"[{len(positions)} {what} tokens]"
        if what == "text":
            content = repr(encoder.tokenizer.decode(encoded.input_ids[first : last + 1]))
        mark = "answer" if is_answer else "yes" if is_label else "-"
        yield f"{first:>5}..{last:<6}  {where:<26} {mark:<6} {content}"
