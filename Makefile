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
	$(BIN)/python -m pytest -n 2 --dist loadfile $(ARGS)

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

setup: $(VENV)/ready

# The constraints pin torch. Where pip's index gives torch with CUDA and you have no GPU, set PIP_EXTRA_INDEX_URL to an index of
# CPU builds: gigabytes less.
$(VENV)/ready: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "es_lite needs Python 3.11 or newer; set PYTHON=")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@
