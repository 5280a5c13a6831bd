# make demo | test (WORKERS=4 on a larger machine) | test-cluster | test-browser | drill | lint | bench. Each sets up .venv by itself.
PYTHON ?= python3
BIN := .venv/bin
export PATH := $(CURDIR)/$(BIN):$(PATH)
DEMO := outputs/demo-data
RECIPE := launch/recipes/demo.yaml
WORKERS := 2
SCORED := --shards $(DEMO)/held_out --benchmark option-letter --max-new-tokens 256

.PHONY: demo test test-cluster test-browser drill lint bench clean

.venv/ready: setup.py constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -q --upgrade pip setuptools wheel
	$(BIN)/pip install -q -c constraints.txt torch
	$(BIN)/pip install -q -c constraints.txt -e '.[dev,ui]'
	touch $@

demo: .venv/ready
	rm -rf $(DEMO) outputs/demo outputs/demo-stage2
	ilvr-ds demo-data --output $(DEMO)
	ilvr-ds pack --input $(DEMO)/task/train.jsonl --output $(DEMO)/train --config $(RECIPE)
	ilvr-ds pack --input $(DEMO)/task/held_out.jsonl --output $(DEMO)/held_out --config $(RECIPE)
	DS_ACCELERATOR=cpu deepspeed --num_gpus 2 launch/train.sh --config $(RECIPE)
	DS_ACCELERATOR=cpu deepspeed --num_gpus 2 launch/train.sh --config launch/recipes/demo-stage2.yaml
	ilvr-ds export outputs/demo-stage2 --to outputs/demo-stage2/model
	ilvr-ds evaluate --model $(DEMO)/model $(SCORED)
	ilvr-ds evaluate --model outputs/demo-stage2/model $(SCORED) --ablate-latents
	ilvr-ds compare $(DEMO)/model outputs/demo-stage2/model

test: .venv/ready
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile

test-cluster: .venv/ready
	$(BIN)/python -m pytest -m cluster -rs --timeout 1200 --durations=0 --durations-min=5 tests/cluster

test-browser: .venv/ready
	$(BIN)/python -m pytest -m browser -rs tests/browser

drill: .venv/ready
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m drill -n $(WORKERS) --dist loadfile

lint: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: .venv/ready
	$(BIN)/python -m tests.bench.step --check-syncs

clean:
	rm -rf .venv outputs build dist *.egg-info
