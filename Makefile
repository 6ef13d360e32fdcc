# Needs GNU make and Python 3.11 or 3.12 (3.13 was not tried) with its venv module (Debian: python3-venv).
# What needs the environment makes it first.

PYTHON ?= python3
VENV ?= .venv
KERAS ?= .venv-keras
CONFIG ?= configs/last4.yaml
PORT ?= 6006
ARGS ?=

RUN := $(VENV)/bin/python -m
CODE := $(wildcard src tests benchmarks)
# A file of tests stays with one process, for tests share trainings; a process took up to 2.7 GB of memory.
# tests/conftest.py says in which order files are given out.
PYTEST := $(RUN) pytest -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder
# Written last, so that an interrupted install is not mistaken for a whole one.
READY := $(VENV)/.ready
# There while an environment that make itself created is not whole: the next attempt starts afresh.
PARTIAL := $(VENV)/.partial

.PHONY: help setup quickstart fit test test-all lint format types check tensorboard bench keras clean distclean

help: ## list the targets
	@sed -n 's/^\([a-z][a-z-]*\):.*## \(.*\)/\1|\2/p' Makefile | awk -F'|' '{ printf "  %-12s %s\n", $$1, $$2 }'

setup: $(READY) ## install everything into VENV (default .venv), at the versions of constraints.txt

$(READY): pyproject.toml constraints.txt
	@if [ -e $(PARTIAL) ]; then rm -rf $(VENV); fi
	@if [ ! -x $(VENV)/bin/python ]; then \
		mkdir -p $(VENV) && touch $(PARTIAL) && $(PYTHON) -m venv $(VENV); fi
	$(RUN) pip install -q -c constraints.txt '.[dev,export]'
	@rm -rf build thaw.egg-info $(PARTIAL)
	@touch $@

quickstart: $(READY) ## a first run, offline, on the built-in sample
	$(RUN) src.cli fit --config configs/last4.yaml --config configs/with/sample.yaml \
		--run.name quickstart $(ARGS)

fit: $(READY) ## train: CONFIG=configs/staged.yaml ARGS="--trainer.max_epochs 3"
	$(RUN) src.cli fit --config $(CONFIG) $(ARGS)

test: $(READY) ## run the tests except the slow ones; ARGS="-k cli" picks some
	$(PYTEST) -m "not slow" $(ARGS)

test-all: $(READY) ## run every test, the slow ones too
	$(PYTEST) $(ARGS)

lint: $(READY) ## check style and formatting
	$(RUN) ruff check $(CODE)
	$(RUN) ruff format --check $(CODE)

format: $(READY) ## mend style and formatting
	$(RUN) ruff check --fix $(CODE)
	$(RUN) ruff format $(CODE)

types: $(READY) ## check the types
	$(RUN) mypy src benchmarks

check: lint types test ## lint, types and test

tensorboard: $(READY) ## show all runs in the browser, on PORT (default 6006)
	$(RUN) tensorboard.main --logdir runs --port $(PORT)

bench: $(READY) ## race thaw against a bare loop, stock Lightning and, after `make keras`, Keras; time its parts
	$(RUN) benchmarks.race --keras $(if $(wildcard $(KERAS)/.ready),$(KERAS)/bin/python,none) $(ARGS)
	$(RUN) benchmarks.input_pipeline
	$(RUN) benchmarks.startup
	$(RUN) benchmarks.memory

keras: $(KERAS)/.ready ## install TensorFlow into KERAS (default .venv-keras), which `make bench` then races against

$(KERAS)/.ready: benchmarks/keras-requirements.txt
	@if [ -e $(KERAS)/.partial ]; then rm -rf $(KERAS); fi
	@if [ ! -x $(KERAS)/bin/python ]; then \
		mkdir -p $(KERAS) && touch $(KERAS)/.partial && $(PYTHON) -m venv $(KERAS); fi
	$(KERAS)/bin/python -m pip install -q -r benchmarks/keras-requirements.txt
	@rm -f $(KERAS)/.partial
	@touch $@

clean: ## remove caches and build products, never runs/ or data/
	rm -rf .mypy_cache .pytest_cache .ruff_cache build dist thaw.egg-info
	find $(CODE) -name __pycache__ -type d -prune -exec rm -rf {} +

distclean: clean ## remove .venv and .venv-keras as well
	rm -rf .venv .venv-keras
