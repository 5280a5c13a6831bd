#!/usr/bin/env bash
""":"
# Run by bash, this file starts the deepspeed launcher on itself: bash launch/train.sh --config RECIPE
# Run by bash under a launcher, it is one rank:                   srun bash launch/train.sh --config RECIPE
# Run by Python, as deepspeed does, it is one rank too:           deepspeed launch/train.sh --config RECIPE
if [ -n "${RANK:-}" ] || [ "${SLURM_STEP_NUM_TASKS:-1}" -gt 1 ]; then exec python3 "$0" "$@"; fi
exec deepspeed "$0" "$@"
":"""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from ilvr_ds.cli import run

run(["train", *sys.argv[1:]])
