# `make demo` shows a policy over-optimising a reward model and what prevents it; `make test` and `make check` are for developers.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

# Compiled programs are kept between runs, the small ones too: there are thousands of them in the tests.
export JAX_COMPILATION_CACHE_DIR := $(CURDIR)/.cache/jax
export JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS := 0

INSTALL := $(BIN)/pip install --quiet --no-compile --disable-pip-version-check

# NumPy's threads would compete with the other worker of the tests for its core.
test test-slow: export OPENBLAS_NUM_THREADS := 1

.PHONY: demo test test-slow check clean

demo: $(VENV)/.installed
	$(BIN)/python experiments/overoptimization.py --preset demo --out runs/demo --overwrite

test: $(VENV)/.installed-test
	$(BIN)/pytest -n 2 -m "not slow"

test-slow: $(VENV)/.installed-test
	$(BIN)/pytest -m slow

check: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/pytest -q --doctest-modules rlhf_jax

clean:
	rm -rf $(VENV) .cache .pytest_cache .ruff_cache .hypothesis .import_linter_cache build *.egg-info

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

# A stamp says that the packages named in setup.py are installed.
$(VENV)/.installed: setup.py | $(BIN)/python
	$(INSTALL) -e .
	touch $@

$(VENV)/.installed-%: setup.py | $(BIN)/python
	$(INSTALL) -e ".[$*]"
	touch $@
