# `make demo` and `make test` work on a fresh machine that has python3 (3.11 or newer) and make.
# Everything is installed once into .venv, at the versions of constraints.txt; pip's own settings are respected.

PYTHON   ?= python3
VENV     ?= .venv
DEMO_OUT ?= runs/demo
PYTEST   ?= -n 2 --dist worksteal
BIN      := $(VENV)/bin
PIP      := $(BIN)/python -m pip install --disable-pip-version-check --quiet --constraint constraints.txt

.DEFAULT_GOAL := help
.PHONY: help demo test lint format wheel clean

help:
	@echo "make demo    train the demo's Pareto front and show it (DEMO_OUT=$(DEMO_OUT))"
	@echo "make test    run the test suite (PYTEST='$(PYTEST)')"
	@echo "make lint    ruff and mypy"
	@echo "make format  format the sources as make lint expects them"
	@echo "make wheel   build dist/moalign-*.whl"
	@echo "make clean   remove caches and build products; $(VENV) and runs/ stay"

demo: $(VENV)/.runtime
	$(BIN)/moalign demo --out $(DEMO_OUT)

test: $(VENV)/.test
	$(BIN)/python -m pytest $(PYTEST)

lint: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.test
	$(BIN)/ruff check --fix-only --quiet .
	$(BIN)/ruff format .

wheel: $(VENV)/.runtime
	$(BIN)/python -m pip wheel --disable-pip-version-check --quiet --no-deps --wheel-dir dist .

clean:
	rm -rf build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -not -path './$(VENV)/*' -prune -exec rm -rf {} +

$(VENV)/.runtime: pyproject.toml constraints.txt | $(BIN)/python
	@echo "installing moalign into $(VENV) (once; torch makes it take minutes)"
	$(PIP) --editable .
	@touch $@

$(VENV)/.test: pyproject.toml constraints.txt | $(BIN)/python
	@echo "installing moalign and its tests' requirements into $(VENV) (once; torch makes it take minutes)"
	$(PIP) --editable '.[test]'
	@touch $@ $(VENV)/.runtime

$(BIN)/python:
	@command -v $(PYTHON) >/dev/null || { \
	  echo "make: no $(PYTHON) here; install Python 3.11 or newer, or name one: make PYTHON=/path/to/python3" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "make: moalign needs Python 3.11 or newer, $(PYTHON) is $$($(PYTHON) -V 2>&1); name another: make PYTHON=/path/to/python3" >&2; exit 1; }
	@$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); \
	  echo "make: $(PYTHON) cannot make a virtual environment; on Debian and Ubuntu: apt install python3-venv" >&2; exit 1; }
