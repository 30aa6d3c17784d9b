# Two commands need nothing but Python >= 3.10, git and a compiler: `make demo` and `make test`.
# Tests of the sandbox for programs are skipped without bubblewrap (apt-get install bubblewrap).
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
DEMO_OUTPUT ?= runs/demo
BENCH ?= head

NATIVE := $(wildcard csrc/*.h csrc/*.cpp csrc/cpu/* csrc/cuda/*)
EMULATOR := $(wildcard tests/backends/emulator/*)
SANITIZED := build/sanitized

.PHONY: demo picture test lint bench bench-env sanitize wheel clean

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
	$(BIN)/clang-format --dry-run --Werror $(NATIVE) $(EMULATOR)

bench: $(VENV)/.installed
	$(BIN)/python -m benchmarks.$(BENCH)

# the rivals: TRL, Liger, CCE
bench-env: $(VENV)/.installed
	$(BIN)/pip install -q --no-build-isolation -c constraints.txt -e ".[bench]"

# the kernels' tests on a library built with the address and undefined-behaviour sanitizers
sanitize: $(VENV)/.installed
	SDPO_SANITIZE=1 $(BIN)/python setup.py -q build_ext --build-lib $(SANITIZED) --build-temp $(SANITIZED)/objects
	SDPO_NATIVE_LIBRARY=$(SANITIZED)/sdpo_kernels/_cpu.so LD_PRELOAD="$$(gcc -print-file-name=libasan.so) $$(gcc -print-file-name=libubsan.so)" \
		ASAN_OPTIONS=detect_leaks=0 $(BIN)/python -m pytest -q -p no:cacheprovider -m "not slow" \
		tests/backends/test_native.py tests/test_logits.py tests/test_logps_extremes.py

# torch first: it is pinned, and everything after it is built and resolved against what is installed
$(VENV)/.installed: pyproject.toml constraints.txt setup.py $(NATIVE)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) || \
		{ echo "cannot make a virtual environment; on Debian: apt-get install python3-venv" >&2; rm -rf $(VENV); exit 1; }
	$(BIN)/python -m pip install -q --upgrade pip "setuptools>=77" wheel
	$(BIN)/python -m pip install -q -c constraints.txt torch ninja
	$(BIN)/python -m pip install -q --no-build-isolation -c constraints.txt -e ".[train,dev]"
	touch $@

# one wheel for every Python from 3.10 on; the CUDA library in it where nvcc is found
wheel: $(VENV)/.installed
	$(BIN)/pip wheel -q --no-build-isolation --no-deps -w dist .

clean:
	rm -rf $(VENV) build dist *.egg-info sdpo_kernels/*.so .pytest_cache .mypy_cache .ruff_cache .hypothesis
