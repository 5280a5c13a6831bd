"""Run by a Python that has vLLM: what the engine says to prompts with images, greedily and in fp32.

python with_vllm.py JOB.json. JOB holds `model`, `turns` (a conversation for each prompt, in which an image's part names
its file), `max_tokens`, `forbidden` (token ids), and perhaps `adapter` (a folder). Writes JOB.found.json, with a list
for each: `prompts` (tokens, as the engine makes them), `free` and `text` (tokens of the answers without and with
`forbidden` forbidden as a client would, by `logit_bias`), `first` (log-probabilities of some first tokens, by id).
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

os.environ |= {
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # with the executor "uni" all of it is this process
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
}


def main(job: Path) -> None:
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    asked = json.loads(job.read_text())
    turns = [[_with_images(turn) for turn in conversation] for conversation in asked["turns"]]
    engine = LLM(
        asked["model"],
        dtype="float32",
        max_model_len=1024,
        max_num_seqs=len(turns),
        enforce_eager=True,
        limit_mm_per_prompt={"image": 2},
        distributed_executor_backend="uni",
        enable_lora=bool(asked.get("adapter")),
    )
    adapter = LoRARequest("adapter", 1, asked["adapter"]) if asked.get("adapter") else None
    bias = dict.fromkeys(asked["forbidden"], -100.0)
    found: dict[str, Any] = {}
    for name, forbidden in (("free", {}), ("text", bias)):
        settings = SamplingParams(temperature=0.0, max_tokens=asked["max_tokens"], logit_bias=forbidden, logprobs=5)
        answers = engine.chat(turns, settings, use_tqdm=False, lora_request=adapter)
        found["prompts"] = [list(answer.prompt_token_ids) for answer in answers]
        found[name] = [list(answer.outputs[0].token_ids) for answer in answers]
        first = [answer.outputs[0].logprobs[0] for answer in answers]
        found["first"] = [{token: entry.logprob for token, entry in entries.items()} for entries in first]
    job.with_suffix(".found.json").write_text(json.dumps(found))


def _with_images(turn: dict[str, Any]) -> dict[str, Any]:
    """With its images opened, as the engine takes them."""
    from PIL import Image

    parts = [
        {"type": "image_pil", "image_pil": Image.open(part["image"]).convert("RGB")}
        if part["type"] == "image"
        else part
        for part in turn["content"]
    ]
    return {**turn, "content": parts}


if __name__ == "__main__":
    main(Path(sys.argv[1]))
