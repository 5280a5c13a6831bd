#!/usr/bin/env bash
""":"
# Run by bash, this file starts the deepspeed launcher on itself:  bash launch/train.sh --config RECIPE
# Run by Python, as the launcher does, it trains on one rank:       deepspeed launch/train.sh --config RECIPE
exec deepspeed "$0" "$@"
":"""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from ilvr_ds.cli import run

run(["train", *sys.argv[1:]])
