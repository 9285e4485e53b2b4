# Every target works alone on a fresh machine with CPython 3.11 or newer: it builds .venv first, and only once.
#
#   make train                                  extract what is missing, train, evaluate: the embedded default
#   make extract CONFIG=configs/mine.toml       stage one for a config of yours
#   make train ARGS="--set draft.markov_rank=0" pass options on to dspark

PYTHON ?= python3
CONFIG ?= configs/embedded.toml
ARGS ?=
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.DEFAULT_GOAL := help
.PHONY: help setup extract train evaluate sweep report checks test bench clean

help: ## Show the targets.
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## /  make \1\t/' | expand -t 18

setup: $(READY) ## Build .venv with the tested versions.

$(READY): pyproject.toml constraints.txt
	@echo "setting up $(VENV) with $$($(PYTHON) --version)"
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "CPython 3.11 or newer is needed; set PYTHON=..."; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --upgrade pip
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch==2.13.0
	PYTHONWARNINGS=ignore $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

extract: setup ## Stage one: run the target once and cache its states.
	$(BIN)/dspark extract $(CONFIG) $(ARGS)

train: setup ## Stage two: train a draft and evaluate it; extracts first what the cache lacks.
	$(BIN)/dspark train --extract $(CONFIG) $(ARGS)

evaluate: setup ## Measure the trained draft on held-out conversations.
	$(BIN)/dspark evaluate $(CONFIG) $(ARGS)

sweep: CONFIG = configs/sweep.toml
sweep: setup ## Train what is left of the trials of the config's [sweep]; extracts first what the cache lacks.
	$(BIN)/dspark sweep --extract $(CONFIG) $(ARGS)

RUNS ?= $(patsubst %/evaluation.json,%,$(wildcard runs/*/evaluation.json runs/*/*/evaluation.json))
report: setup ## Compare the evaluated runs runs/* and runs/*/*, or RUNS="a b": a table and report.html.
	$(BIN)/dspark report $(RUNS)

checks: setup ## Format, lint and types.
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

# A process a core, each with one thread: ARGS="-n 0" runs all in one, ARGS="tests/test_evaluate.py -k bootstrap" some.
# A file stays in one process, for its fixtures; eight processes take 6 GB of memory.
test: setup ## The tests, in some minutes.
	OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(BIN)/python -m pytest -n auto --maxprocesses 8 --dist loadfile \
		--no-loadscope-reorder $(ARGS)

bench: setup ## Time extraction, reading and training on this machine; ARGS="sweep": sweeps.
	$(BIN)/python benchmarks/run.py $(ARGS)

clean: ## Remove what make built; runs/ stays.
	rm -rf $(VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
