"""Run by a Python that has transformers 4: what stock classes make of exported models, one text and one image.

python with_transformers_4.py IMAGE QUESTION MODEL...; writes MODEL/of-4.safetensors.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import transformers
from PIL import Image
from safetensors.torch import save_file
from transformers import AutoTokenizer, Qwen2_5_VLForConditionalGeneration, Qwen2VLImageProcessor


def main(image: str, question: str, *folders: str) -> None:
    assert transformers.__version__.startswith("4."), transformers.__version__
    for folder in folders:
        tokenizer = AutoTokenizer.from_pretrained(folder)
        model, info = Qwen2_5_VLForConditionalGeneration.from_pretrained(folder, output_loading_info=True)
        assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"], info
        assert model.dtype == torch.float32, model.dtype
        pixels = Qwen2VLImageProcessor.from_pretrained(folder)(Image.open(image).convert("RGB"), return_tensors="pt")
        turn = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}
        text = tokenizer.apply_chat_template([turn], tokenize=False, add_generation_prompt=True)
        merged = int(pixels["image_grid_thw"].prod()) // 4
        ids = tokenizer(text.replace("<|image_pad|>", "<|image_pad|>" * merged), return_tensors="pt")
        with torch.no_grad():
            logits = model.eval()(**ids, **pixels).logits
        found = {"input_ids": ids["input_ids"], "logits": logits.contiguous()}
        save_file(found, Path(folder) / "of-4.safetensors")


if __name__ == "__main__":
    main(*sys.argv[1:])
