# Two commands do everything on a fresh machine with Python 3.11 or newer:
#   make train    sets up and runs recipes/qwen3_0p5b_cpu.toml    (RECIPE=recipes/quickstart.toml for another)
#   make test     sets up and passes the tests (make test-long: the sweeps and soaks, which take longer)
PYTHON ?= python3
VENV ?= .venv
RECIPE ?= recipes/qwen3_0p5b_cpu.toml
ARGS ?=
BIN := $(VENV)/bin

.PHONY: train test test-long lint setup
train: setup
	$(BIN)/python -m es_lite.train $(RECIPE) $(ARGS)

test: setup lint
	$(BIN)/python -m pytest -n 2 --dist loadfile -m "not long" $(ARGS)

test-long: setup
	$(BIN)/python -m pytest -n 2 --dist loadfile -m long $(ARGS)

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	for version in 3.11 3.12 3.13; do $(BIN)/mypy --python-version $$version es_lite || exit 1; done

setup: $(VENV)/ready

# The constraints pin torch. Where pip's index gives torch with CUDA and you have no GPU, set PIP_EXTRA_INDEX_URL to an index of
# CPU builds: gigabytes less.
$(VENV)/ready: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "es_lite needs Python 3.11 or newer; set PYTHON=")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@
