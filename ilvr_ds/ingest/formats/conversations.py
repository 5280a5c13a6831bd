"""Conversations of one or several turns without helper images, to be mixed in: LLaVA's format
(github.com/haotian-liu/LLaVA, docs/Finetune_Custom_Data.md), ShareGPT's, and chat messages.

    {"id": ..., "image": "a.jpg", "conversations": [{"from": "human", "value": "<image>\\nWhat is it?"},
                                                    {"from": "gpt", "value": "A cat."}, ...]}
    {"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}], "images": [...]}

Each of the assistant's turns is learned from. A single question without a reply is a sample to evaluate on.
"""

from __future__ import annotations

import re

from ilvr_ds.data.sample import TextStep
from ilvr_ds.ingest.formats.pieces import stated_answer
from ilvr_ds.ingest.formats.turns import last_question, read_turns
from ilvr_ds.ingest.record import Draft, Record, RecordFormat, short_text

FAMILY = "conversations"
OWN_KEYS = "conversations|messages|system|images?"


def _recognise(record: Record) -> str:
    key = next((key for key in ("conversations", "messages") if isinstance(record.get(key), list)), "")
    return f"it has the turns '{key}'" if key else ""


def _read(record: Record) -> Draft:
    turns, images = read_turns(record)
    history, question, reply = last_question(turns)
    return Draft(
        question=question,
        steps=[TextStep(reply)] if reply else [],
        input_images=images,
        helper_images=[],
        answer=stated_answer(reply),
        history=list(history),
        group=short_text(record, "dataset"),
    )


CONVERSATIONS = RecordFormat("conversations", re.compile(OWN_KEYS), _recognise, _read, FAMILY)
