# Everything lands in .venv; nothing needs more than Python 3.11+ with venv, and make.
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.headrace-installed
MODEL ?= smollm2-135m

.DEFAULT_GOAL := help
.PHONY: help install up down status test test-all check lint types contracts protos format clean

help:  ## Show this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

install: $(STAMP)  ## Set everything up in .venv, with the default model
	@$(BIN)/headrace models pull $(MODEL) --quiet-if-present

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "Headrace needs Python 3.11 or newer; name one with make PYTHON=python3.12"; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv || \
	  { echo "$(PYTHON) has no venv: apt install python3-venv"; exit 1; }
	$(BIN)/python -m pip install --disable-pip-version-check -q -c constraints.txt -e '.[all,dev]'
	@touch $@

up: install  ## Start the mesh and print how to talk to it
	@$(BIN)/headrace up --model $(MODEL) $(ARGS)

down:  ## Stop a mesh that runs detached
	@$(BIN)/headrace down

status:  ## Show processes, workers and health
	@$(BIN)/headrace status

check: install lint types contracts  ## Lint, types, import contracts, protos

lint:
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/buf lint
	$(BIN)/python scripts/gen_protos.py --check

types:
	$(BIN)/mypy

contracts:
	$(BIN)/lint-imports

test: install  ## Run the tests (about 15 minutes on 2 cores)
	$(BIN)/python -m pytest -m "not slow and not gpu" $(ARGS)

test-all: install  ## Run all tests, the long ones too
	$(BIN)/python -m pytest $(ARGS)

protos: $(STAMP)  ## Generate headrace/v1 from protos/
	$(BIN)/python scripts/gen_protos.py

format: $(STAMP)  ## Format the code
	$(BIN)/ruff check --fix-only .
	$(BIN)/ruff format .

clean:  ## Remove the environment and what tools left behind
	rm -rf .venv .bench .mypy_cache .ruff_cache .pytest_cache .import_linter_cache
