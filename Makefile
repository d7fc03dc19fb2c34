# Everything a newcomer needs: `make demo` and `make test`. Both create .venv themselves.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
JOBS ?= 2
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet -c constraints.txt

.DEFAULT_GOAL := help
.PHONY: help setup demo lint format test test-all bench docs clean

help: ## what there is
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*##/\t/' | expand -t 14

# torch first and alone: its pinned version must be in place before anything asks for a range of it.
$(VENV)/.ready: pyproject.toml setup.py constraints.txt src/conjugo/optim/_kernels.c src/conjugo/optim/_kernels_body.h
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "setting up $(VENV) (the first time takes some minutes)"
	@$(PIP) "$$(grep '^torch==' constraints.txt)"
	@$(PIP) -e ".[dev]"
	@touch $@

$(VENV)/.docs: $(VENV)/.ready
	@$(PIP) -e ".[docs]"
	@touch $@

$(VENV)/.bench: $(VENV)/.ready
	@$(PIP) -e ".[bench]"
	@touch $@

setup: $(VENV)/.ready ## create the virtual environment

demo: $(VENV)/.ready ## compare the optimizers over batch sizes on embedded data (about five minutes)
	$(BIN)/conjugo compare --preset demo --jobs $(JOBS) --out runs/demo $(if $(wildcard runs/demo/config.json),--resume)

lint: $(VENV)/.ready ## formatting, linting, types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: $(VENV)/.ready ## format and mend what can be mended automatically
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# One thread for each of two worker processes: on two shared cores that is faster than two threads each.
TEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS)

test: lint ## formatting, linting, types and the tests (under 15 minutes on two cores)
	$(TEST) -m "not slow"

test-all: lint ## the tests, the slow ones too
	$(TEST)

bench: $(VENV)/.bench ## speed and memory as ratios against named peers
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks

docs: $(VENV)/.docs ## the site, in docs/_build/html
	$(BIN)/python -m sphinx -W --keep-going -b html docs docs/_build/html

clean: ## remove what was built
	rm -rf $(VENV) build docs/_build docs/api src/*.egg-info
