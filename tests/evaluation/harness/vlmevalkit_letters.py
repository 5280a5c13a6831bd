"""Run in an environment with VLMEvalKit: its own letters of the replies on standard input, without another model."""

from __future__ import annotations

import json
import sys

from vlmeval.utils.matching_util import can_infer

asked = json.load(sys.stdin)
letters = [can_infer(reply, dict(asked["options"])) or "" for reply in asked["replies"]]
print("letters: " + json.dumps(letters))
