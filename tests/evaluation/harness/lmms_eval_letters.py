"""Run in an environment with lmms-eval: its own letters of the replies on standard input, by task."""

from __future__ import annotations

import json
import sys

from lmms_eval.tasks.blink.utils import _extract_answer_letter as blink
from lmms_eval.tasks.mme_realworld.utils import extract_characters_regex as mme_realworld
from lmms_eval.tasks.mmvp.utils import _extract_answer_letter as mmvp
from lmms_eval.tasks.vstar_bench.utils import extract_answer_letter as vstar

RULES = {"vstar": vstar, "mmvp": mmvp, "blink": lambda reply: blink(reply, "ABCD"), "mme-realworld-lite": mme_realworld}
replies = json.load(sys.stdin)
letters = {name: [rule(reply) or "" for reply in replies] for name, rule in RULES.items()}
print("letters: " + json.dumps(letters))
