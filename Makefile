# From a fresh clone, with nothing but Python 3.11+ and make: `make demo`, `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.DEFAULT_GOAL := help
.PHONY: help demo test test-slow torture fuzz audit lint format bench bench-quick bench-train bench-gpu bench-growth verify-published release-check clean

help:  ## show this help
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-16s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt --editable '.[dev]'
	@touch $@

demo: $(INSTALLED)  ## train a small BERT on docstrings, distil it, and compare (4 to 9 minutes on 2 CPU cores)
	$(BIN)/python -m distilkit.train experiment=demo

test: $(INSTALLED)  ## run the tests but the slow ones
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -m "not slow and not fuzz" -n auto --maxprocesses 4

test-slow: $(INSTALLED)  ## run the slow tests: the wheel, several processes, the demo in short
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -m slow -n auto --maxprocesses 2

fuzz: $(INSTALLED)  ## give commands and readers wrong values and damaged files, 1,500 cases (15 minutes)
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -m fuzz -p no:logging tests/fuzz

audit: $(INSTALLED)  ## look up the installed packages in the list of known vulnerabilities; needs PyPI
	$(PYTHON) -m venv $(VENV)/audit
	$(VENV)/audit/bin/python -m pip install --quiet --disable-pip-version-check pip-audit
	$(VENV)/audit/bin/pip-audit --strict --skip-editable \
	  --path "$$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')"

torture: $(INSTALLED)  ## kill, stop and damage runs in some 60 ways, and print what held (10 minutes)
	PYTHONPATH=tests $(BIN)/python -m torture

lint: $(INSTALLED)  ## check style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(INSTALLED)  ## fix style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(INSTALLED)  ## time and memory of a step of BERT-base, compared with a naive one, at 4,096 tokens
	HF_HUB_OFFLINE=1 $(BIN)/python -m benchmarks

bench-quick: $(INSTALLED)  ## the same at a small size
	HF_HUB_OFFLINE=1 $(BIN)/python -m benchmarks --size small

bench-train: $(INSTALLED)  ## whole trainings, compared with a script of transformers' Trainer
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt --editable '.[bench]'
	$(BIN)/python -m benchmarks train

bench-gpu: $(INSTALLED)  ## BERT, RoBERTa and GPT-2 on one GPU, at rising batch sizes until its memory is full
	HF_HUB_OFFLINE=1 $(BIN)/python -m benchmarks gpu

bench-growth: $(INSTALLED)  ## cost of loss and preparation by tokens, vocabulary and text (35 minutes)
	HF_HUB_OFFLINE=1 $(BIN)/python -m benchmarks growth

verify-published: $(INSTALLED)  ## fine-tune the published DistilBERT and compare with table 1 of the paper; hub, hours
	$(BIN)/python -m benchmarks.published

release-check:  ## build sdist and wheel of HEAD, install each in an empty environment, and distil there; pip
	$(PYTHON) benchmarks/release.py

clean:  ## remove everything that make created, including the demo's runs
	rm -rf $(VENV) build dist outputs benchmarks/results *.egg-info src/*.egg-info .pytest_cache .mypy_cache .ruff_cache
	find src conf tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +
