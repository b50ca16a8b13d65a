# On a fresh machine with Python 3.11 or newer, one command is enough:
#   make train        installs es_lite in .venv and runs recipes/qwen3_0p5b_cpu.toml
#                     (another: RECIPE=recipes/quickstart.toml; options: ARGS=--resume)
#   make test         installs it, checks the code (make lint) and runs the tests
#   make test-long    runs the sweeps and soaks, which take longer
PYTHON ?= python3
VENV ?= .venv
RECIPE ?= recipes/qwen3_0p5b_cpu.toml
ARGS ?=
BIN := $(VENV)/bin

.PHONY: train test test-long lint setup
train: setup
	$(BIN)/python -m es_lite.train $(RECIPE) $(ARGS)

test: setup lint
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder -m "not long" $(ARGS)

test-long: setup
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder -m long $(ARGS)

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	for version in 3.11 3.12 3.13; do $(BIN)/mypy --python-version $$version es_lite || exit 1; done

setup: $(VENV)/ready

# The constraints pin torch. If your pip index serves torch with CUDA and you have no GPU, set PIP_EXTRA_INDEX_URL to an index of
# CPU builds, which are gigabytes smaller.
$(VENV)/ready: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "es_lite needs Python 3.11 or newer; set PYTHON=")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@
