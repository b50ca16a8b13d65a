# Two commands do everything on a fresh machine with Python 3.11 or newer:
#   make train    sets up and runs recipes/qwen3_0p5b_cpu.toml    (RECIPE=recipes/quickstart.toml for another)
#   make test     sets up and passes the tests
PYTHON ?= python3
VENV ?= .venv
RECIPE ?= recipes/qwen3_0p5b_cpu.toml
ARGS ?=
BIN := $(VENV)/bin

.PHONY: train test lint setup
train: setup
	$(BIN)/python -m es_lite.train $(RECIPE) $(ARGS)

test: setup lint
	$(BIN)/python -m pytest $(ARGS)

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

setup: $(VENV)/ready

# The constraints pin torch: a newer one, or one with CUDA, would be gigabytes more.
$(VENV)/ready: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "es_lite needs Python 3.11 or newer; set PYTHON=")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@
