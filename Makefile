# Two commands: `make demo` shows the whole path, `make test` proves it. Each sets up .venv first if it must.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.PHONY: demo test gate clean

demo: $(INSTALLED)
	$(BIN)/dataengine demo out/demo

# One thread a process: on a shared machine, threads that spin at their barriers cost more than they give.
test: export OMP_NUM_THREADS = 1
test: gate
	$(BIN)/pytest -m "not ray" --durations=10
	$(BIN)/pytest -m ray

# What a machine can check without running anything: style, import arrows, types.
gate: $(INSTALLED)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/lint-imports
	$(BIN)/mypy

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed, this is %s" % sys.version)'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check --quiet --constraint constraints.txt --editable ".[dev]"
	touch $@

clean:
	rm -rf $(VENV) out .mypy_cache .pytest_cache .ruff_cache
