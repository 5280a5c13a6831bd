"""The README.md of an exported model: what it is, what it was trained on, how, and from which state of the code."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from ilvr_ds import __version__
from ilvr_ds.data.tokens import SpecialTokens
from ilvr_ds.model.families import Family
from ilvr_ds.provenance import commit
from ilvr_ds.tracking.registry import is_exported
from ilvr_ds.whole_files import write_whole

FILE = "README.md"
_HEADING = "## Scores\n"
_NONE = "None known; `ilvr-ds evaluate` adds them.\n"
_TEXT = """\
---
base_model: {base}
library_name: transformers
pipeline_tag: image-text-to-text
---
# {name}

A {title} trained for interleaved latent visual reasoning by ilvr_ds {version} (commit {commit}).

- base model: `{base}`
- data: `{data}`
- optimizer steps: {step}, stage {stage}
- latent size: {latent_size}
- weights: {dtype}

Stock `{model}.from_pretrained` of transformers {loaded_by} loads it; `AutoProcessor` needs
torchvision too (`pip install torchvision`). This runs latent segments:

    ilvr-ds generate --model . --image a.png --question "..."

The stock `generate`, vLLM and SGLang do not: a segment that is opened there has no latents. They answer in text where
its tokens are forbidden, by `generate(suppress_tokens={latent_tokens})`, or in a request by
`"logit_bias": {logit_bias}`.

## Scores
{scores}
## Recipe
```json
{recipe}
```
"""


def write_card(
    folder: Path, state: dict[str, Any], checkpoint: Path, dtype: torch.dtype, family: Family, special: SpecialTokens
) -> None:
    """Write the model card for a checkpoint whose state.json holds `state`."""
    recipe = state["recipe"]
    latent_tokens = [special.latent_pad, special.latent_start, special.latent_end]
    text = _TEXT.format(
        name=recipe["run"]["name"],
        base=recipe["model"]["path"],
        data=_data(recipe["data"]["shards"]),
        step=state["step"],
        stage=recipe["train"]["stage"],
        latent_size=recipe["model"]["latent_size"],
        latent_tokens=latent_tokens,
        logit_bias=json.dumps(dict.fromkeys(map(str, latent_tokens), -100)),
        dtype=str(dtype).removeprefix("torch."),
        version=__version__,
        title=family.title,
        model=family.model.__name__,
        loaded_by=family.loaded_by,
        commit=commit()[0],
        scores=_scores(checkpoint.parent.parent / "metrics.jsonl", state["step"]),
        recipe=json.dumps(recipe, indent=1),
    )
    (folder / FILE).write_text(text, encoding="utf-8")


def _data(shards: str | list[dict[str, Any]]) -> str:
    """What was trained on: a path, or those of a mixture with their weights or epochs."""
    if isinstance(shards, str):
        return shards
    return " + ".join(
        f"{entry['path']} (" + (f"weight {entry['weight']:g})" if entry["weight"] else f"epochs {entry['epochs']:g})")
        for entry in shards
    )


def add_scores(folder: Path, benchmark: str, data: str, scores: dict[str, Any]) -> str | None:
    """Put an evaluation's accuracies into the card of an exported model, in place of those of this benchmark before.

    data: where its samples lie. scores: the content of scores.json. Returns a line that says where they stand, or why
    they do not; None where the model was not exported here.
    """
    card = folder / FILE
    if not is_exported(folder):
        return None
    start, end = f"<!-- {benchmark} -->\n", f"<!-- end of {benchmark} -->\n"
    try:
        text = card.read_text(encoding="utf-8")
        if start in text and end in text.partition(start)[2]:
            before, _, after = text.partition(start)
            after = after.partition(end)[2]
        else:
            before, heading, after = text.partition(_HEADING)
            if not heading:
                return f"{card}: has no section {_HEADING.strip()}; the scores are not in it"
            before, after = before + heading, "\n" + after.removeprefix(_NONE).removeprefix("\n")
        write_whole(card, before + start + _table(benchmark, data, scores) + end + after)
    except (OSError, UnicodeDecodeError) as error:
        return f"{card}: the scores are not in it ({error})"
    return f"accuracies are in the model card, too: {card}"


def _table(benchmark: str, data: str, scores: dict[str, Any]) -> str:
    lines = [f"`{benchmark}` on `{data}`:", "", "| rules | samples | accuracy | mean over types |", "|---|---|---|---|"]
    for rule, part in scores["rules"].items():
        samples = sum(kind["samples"] for kind in part["types"].values())
        lines.append(f"| {rule} | {samples} | {part['accuracy']:.4g} | {part['macro_mean']:.4g} |")
    versions = [f"{rule} {part['version']}" for rule, part in scores["rules"].items() if "version" in part]
    return "\n".join([*lines, *(["", f"Versions of the rules: {', '.join(versions)}."] if versions else [])]) + "\n"


def _scores(record: Path, step: int) -> str:
    """The last evaluation up to this step, if the run's record is there."""
    last: dict[str, float] = {}
    after = 0
    for text in record.read_text().splitlines(keepends=True) if record.is_file() else []:
        if not text.endswith("\n"):  # it was being written when the run was killed
            break
        line = json.loads(text)
        metrics = {name: float(value) for name, value in line.get("metrics", {}).items() if name.startswith("eval/")}
        if metrics and line["step"] <= step:
            last, after = metrics, line["step"]
    if not last:
        return _NONE
    lines = [f"- {name.removeprefix('eval/')}: {value:.4g}" for name, value in sorted(last.items())]
    free = [line for line in lines if line.startswith("- generated")]
    forced = [line for line in lines if line not in free]
    text = f"Teacher-forced, on held-out samples, after step {after}:\n\n" + "\n".join(forced) + "\n"
    return text + ("\nAnswered freely, some of them:\n\n" + "\n".join(free) + "\n" if free else "")
