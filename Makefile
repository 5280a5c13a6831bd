# make demo | test (WORKERS=4 on a larger machine) | test-cluster | test-browser | drill | lint | bench. Each sets up .venv by itself.
PYTHON ?= python3
BIN := .venv/bin
export PATH := $(CURDIR)/$(BIN):$(PATH)
DEMO := outputs/demo-data
WORKERS := 2

.PHONY: demo test test-cluster test-browser drill lint bench clean

.venv/ready: setup.py constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -q --upgrade pip setuptools wheel
	$(BIN)/pip install -q -c constraints.txt torch
	$(BIN)/pip install -q -c constraints.txt -e '.[dev,ui]'
	touch $@

demo: .venv/ready
	rm -rf $(DEMO) outputs/trail outputs/trail-stage2
	ilvr-ds demo-data --trained --output $(DEMO) --held-out 256
	ilvr-ds pack --input $(DEMO)/task/train.jsonl --output $(DEMO)/train --config trail
	ilvr-ds pack --input $(DEMO)/task/held_out.jsonl --output $(DEMO)/held_out --config trail
	DS_ACCELERATOR=cpu deepspeed --num_gpus 2 launch/train.sh --config trail
	DS_ACCELERATOR=cpu deepspeed --num_gpus 2 launch/train.sh --config trail-stage2
	ilvr-ds export outputs/trail-stage2 --to outputs/trail-stage2/model
	ilvr-ds audit --model outputs/trail-stage2/model --shards $(DEMO)/held_out --benchmark option-letter --batch-size 128

test: .venv/ready
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile

test-cluster: .venv/ready
	$(BIN)/python -m pytest -m cluster -rs --timeout 1200 --durations=0 --durations-min=5 tests/cluster

test-browser: .venv/ready
	$(BIN)/python -m pytest -m browser -rs tests/browser

drill: .venv/ready
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m drill -n $(WORKERS) --dist loadfile --no-loadscope-reorder

lint: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: .venv/ready
	$(BIN)/python -m tests.bench.step --check-syncs

clean:
	rm -rf .venv outputs build dist *.egg-info
