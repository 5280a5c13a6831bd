"""What the teacher selects on the demo, and why: cosines of the parts of its query to empty cells and to shapes.

    python -m tests.bench.selected_cells outputs/demo

reads a run of stage 1 on the demo (its recipe.json and newest checkpoint) and prints one table for its first step and
one for its last. One rank.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ilvr_ds.config import load_recipe
from ilvr_ds.distill.query import Context
from ilvr_ds.engine.networks import init_process_group
from ilvr_ds.training.assembly import assemble
from ilvr_ds.training.components import Components
from ilvr_ds.training.trainer import Trainer

SAMPLES = 64


def main(run: Path) -> None:
    init_process_group()
    newest = max((run / "checkpoints").glob("step-*"))
    for resume, name in (("never", "before the first step"), (str(newest), "after the last step")):
        settings = {
            "run.output_dir": run.parent / ".selected-cells", "checkpoint.resume": resume,
            "tracking.picture_samples": 0, "tracking.uri": "http://127.0.0.1:9",
        }  # fmt: skip
        recipe = load_recipe(run / "recipe.json", [f"{key}={value}" for key, value in settings.items()])
        parts = assemble(recipe, run / "recipe.json")
        trainer = Trainer(parts)
        trainer._restore()
        print(f"\n{name} ({trainer.done}), {SAMPLES} held-out samples")
        table(parts)
        parts.tracker.close("KILLED", timeout_s=0)


@torch.no_grad()
def table(parts: Components) -> None:
    """Cosines of each part of the query to the two kinds of candidates, and what is selected."""
    assert parts.held_out is not None
    dataset, teacher = parts.held_out.dataset, parts.step.teacher
    assert teacher is not None
    rows: dict[str, list[tuple[float, float]]] = {}
    kept = empty = cells = empty_cells = 0
    for start in range(0, SAMPLES, 16):
        window = dataset.window([np.arange(start, start + 16)])
        features = parts.step.vision.features(window)
        targets = parts.step.selector(window, features, teacher.read(window, features))
        is_empty = torch.cat([_is_empty(dataset, number) for number in _in_order(window)])
        unit = torch.nn.functional.normalize(targets.candidates.float(), dim=-1)
        context, image, text = _parts(teacher.network, window, features)
        sample = window.context.sample
        parts_of = {"query": targets.query, "images": image[sample], "question": text[sample], "text": context.step}
        chosen = targets.indices[targets.indices >= 0]
        kept, empty = kept + len(chosen), empty + int(is_empty[chosen].sum())
        cells, empty_cells = cells + len(is_empty), empty_cells + int(is_empty.sum())
        for m in range(len(sample)):
            mine = slice(int(targets.offsets[m]), int(targets.offsets[m + 1]))
            if not 0 < int(is_empty[mine].sum()) < len(is_empty[mine]):
                continue
            for name, vectors in parts_of.items():
                if vectors[m].norm() > 0:
                    cosine = unit[mine] @ torch.nn.functional.normalize(vectors[m].float(), dim=-1)
                    on_empty, on_shapes = cosine[is_empty[mine]].mean(), cosine[~is_empty[mine]].mean()
                    rows.setdefault(name, []).append((float(on_empty), float(on_shapes)))
        if start == 0:
            print(f"empty to empty {_mean(unit[is_empty], unit[is_empty]):.2f}, empty to shape "
                  f"{_mean(unit[is_empty], unit[~is_empty]):.2f}, shape to shape "
                  f"{_mean(unit[~is_empty], unit[~is_empty]):.2f}")  # fmt: skip
    print(f"empty: {100 * empty_cells / cells:.0f} % of the candidates, {100 * empty / kept:.0f} % of the selected")
    for name, values in rows.items():
        a, b = np.array(values).T
        print(f"  {name:<10} to empty cells {a.mean():+.2f}, to shapes {b.mean():+.2f}")


def _mean(a: Tensor, b: Tensor) -> float:
    cosine = a @ b.T
    return float(cosine[cosine < 0.99999].mean()) if (cosine < 0.99999).any() else 1.0


def _in_order(window: Any) -> list[tuple[int, int]]:
    """Sample number and segment of each segment of the window, in the window's order."""
    [micro] = window.micro_batches
    return [(int(number), int(m)) for number, m in micro.noise_keys[torch.argsort(micro.segments)]]


def _is_empty(dataset: Any, segment: tuple[int, int]) -> Tensor:
    """[candidates] bool: nothing is drawn in the cell."""
    number, m = segment
    seen = dataset.encoder.images.seen(dataset.reader.read(number).helper_images[m])
    pixels = np.asarray(seen.convert("L"), dtype=np.float32)
    cell = dataset.encoder.images.cell
    grid = pixels.reshape(pixels.shape[0] // cell, cell, pixels.shape[1] // cell, cell)
    return torch.from_numpy(grid.std((1, 3)).flatten() < 4)


def _parts(network: Any, window: Any, features: Tensor) -> tuple[Context, Tensor, Tensor]:
    """The teacher's context, and the two parts of what it takes from the user: images and question, [W, D] each."""
    found: dict[str, Tensor] = {}
    module = network.module
    whole = module._user_context

    def noting(hidden: Tensor, embeddings: Tensor, context: Any) -> Tensor:
        found["image"] = torch.einsum(
            "wi,wid->wd", module._image_weights(hidden, context), hidden[context.image].float()
        )
        result: Tensor = whole(hidden, embeddings, context)
        return result

    module._user_context = noting
    context = network(window.tokens, features, window.context)
    del module._user_context
    return context, found["image"], 2 * context.user - found["image"]


if __name__ == "__main__":
    main(Path(sys.argv[1]))
