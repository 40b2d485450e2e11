# make search: the quickstart on a fresh machine.   make test: everything that must hold before a change is merged.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready

.PHONY: help setup search test lint format slow clean
help:
	@echo "make search  set up .venv and run the quickstart search into results/quick"
	@echo "make test    set up .venv, then lint, type check and test"
	@echo "make lint    ruff and mypy only"
	@echo "make format  ruff, rewriting files"
	@echo "make slow    the tests that take minutes"
	@echo "make clean   remove .venv and all caches; results/ stays"

setup: $(READY)

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 10) or sys.exit("Python 3.10 or newer is needed, this is " + sys.version.split()[0] + ": make PYTHON=/path/to/python3.11")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -c constraints.txt -e '.[dev]'
	@touch $@

search: $(READY)
	@if [ -e results/quick/manifest.json ]; then $(BIN)/nasgraph resume results/quick; \
	else $(BIN)/nasgraph search configs/quickstart.yaml --out results/quick; fi

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

test: lint
	$(BIN)/pytest

slow: $(READY)
	$(BIN)/pytest -m slow --timeout 3600

clean:
	rm -rf .venv build dist *.egg-info .hypothesis .coverage .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
