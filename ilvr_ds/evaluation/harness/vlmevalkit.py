"""Our models in VLMEvalKit: its own command with our class added to its models.

    python -m ilvr_ds.evaluation.harness.vlmevalkit VLMEvalKit/run.py --config CONFIG.json --judge exact_matching

VLMEvalKit has no plug-ins: a model of `--config` names a class of `vlmeval.vlm`, which this makes one of ours. Without
a path the installed package's own command runs.
"""

from __future__ import annotations

import runpy
import sys
from pathlib import Path
from typing import Any

import vlmeval.vlm
from vlmeval.smp import get_logger
from vlmeval.vlm.base import BaseModel

from ilvr_ds.evaluation.harness.answering import Answerer, HarnessSettings, Part
from ilvr_ds.generation.settings import GenerationSettings

NAME = "ILVR"
"""What `"class"` says in VLMEvalKit's configuration."""


class LatentReasoner(BaseModel):  # type: ignore[misc]
    """A model of VLMEvalKit; its arguments are those of HarnessSettings. Prompts are the data sets' own."""

    INTERLEAVE = True
    allowed_types = ("text", "image")
    answers = 0
    with_latents = 0
    """Of all answers of this process."""

    def __init__(self, model: str, **settings: Any) -> None:
        super().__init__()
        self.answerer = Answerer(HarnessSettings(model=model, **settings))

    def generate_inner(self, message: list[dict[str, str]], dataset: str | None = None) -> str:
        """Answer a turn of words and paths of pictures."""
        turn: list[Part] = [
            Path(part["value"]).read_bytes() if part["type"] == "image" else part["value"] for part in message
        ]
        [reply] = self.answerer([turn], GenerationSettings(max_new_tokens=1))
        LatentReasoner.answers += 1
        LatentReasoner.with_latents += reply.latent_steps > 0
        return reply.text


def main() -> None:
    """Run VLMEvalKit's command with the arguments after ours."""
    script = Path(sys.argv[1]) if len(sys.argv) > 1 and sys.argv[1].endswith(".py") else None
    if script is not None and not script.is_file():
        sys.stderr.write(f"error: {script}: is not there; give the path of run.py in a checkout of VLMEvalKit\n")
        raise SystemExit(2)
    setattr(vlmeval.vlm, NAME, LatentReasoner)
    if script is None:
        runpy.run_module("vlmeval", run_name="__main__", alter_sys=True)
    else:
        sys.argv = sys.argv[1:]
        sys.path.insert(0, str(script.parent))
        runpy.run_path(str(script), run_name="__main__")
    get_logger("ilvr_ds").info("%d of %d answers used latents", LatentReasoner.with_latents, LatentReasoner.answers)


if __name__ == "__main__":
    main()
