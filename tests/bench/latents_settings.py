"""What the results of tests/bench/latents.py were made with, kept beside them so that no others are taken for them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ilvr_ds.errors import UserError

OF_DATA = ("samples", "held_out", "latents", "size", "family", "precision", "look_samples")
"""Options that decide what lies in the folder before anything is trained."""
OF_TRAINING = ("steps", "second_steps", "batch", "accum", "lr", "second_lr", "look_steps")
"""Options that decide the results besides; arm, signs and seed are in the name of each."""


def keep_settings(options: Any) -> None:
    """Write the deciding options to OUTPUT/settings.json; with --draw-only those of the data alone.

    Raises UserError where the folder holds results or data of others.
    """
    output: Path = options.output
    file, names = output / "settings.json", (*OF_DATA, *(() if options.draw_only else OF_TRAINING))
    asked = {name: getattr(options, name) for name in names}
    if file.exists():
        kept = json.loads(file.read_text())
    elif (output / "results.jsonl").exists() or any(output.glob("data-*")):
        raise UserError(f"{file}: is missing beside results or data, so nobody knows whose; give another --output")
    else:
        kept = {}
    for name, value in asked.items():
        if kept.get(name, value) != value:
            option = f"--{name.replace('_', '-')}"
            raise UserError(f"{file}: what is there was made with {option} {kept[name]}, not {value}; "
                            "give another --output")  # fmt: skip
    output.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(kept | asked, indent=1) + "\n")
