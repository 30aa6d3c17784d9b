# Two commands need nothing but Python >= 3.10, git and a compiler: `make demo` and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
DEMO_OUTPUT ?= runs/demo
BENCH ?= head

.PHONY: demo picture test lint bench bench-env clean

demo: $(VENV)/.installed
	$(BIN)/python -m examples.demo.run --output $(DEMO_OUTPUT)

# the picture that README shows
picture: demo
	cp $(DEMO_OUTPUT)/comparison.png docs/demo.png

test: $(VENV)/.installed
	$(BIN)/python -m pytest -q -n 2 --dist loadgroup

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(VENV)/.installed
	$(BIN)/python -m benchmarks.$(BENCH)

# the rivals: TRL, Liger, CCE
bench-env: $(VENV)/.installed
	$(BIN)/pip install -q --no-build-isolation -c constraints.txt -e ".[bench]"

# torch first: it is pinned, and everything after it is built and resolved against what is installed
$(VENV)/.installed: pyproject.toml constraints.txt setup.py
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) || \
		{ echo "cannot make a virtual environment; on Debian: apt-get install python3-venv" >&2; rm -rf $(VENV); exit 1; }
	$(BIN)/python -m pip install -q --upgrade pip "setuptools>=77" wheel
	$(BIN)/python -m pip install -q -c constraints.txt torch
	$(BIN)/python -m pip install -q --no-build-isolation -c constraints.txt -e ".[train,dev]"
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
