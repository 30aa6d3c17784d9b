# `make demo` and `make test` need only Python >= 3.10, git and a compiler.
# Tests of the sandbox for untrusted programs are skipped without bubblewrap (apt-get install bubblewrap).
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
DEMO_OUTPUT ?= runs/demo
CHROMIUM ?= chromium --headless=new --no-sandbox --disable-gpu --hide-scrollbars
BENCH ?= head

# another torch than the pinned one: `make test TORCH=2.10.0`. One with CUDA asks for a Triton of its own: TRITON=3.6.0
TORCH ?= $(shell sed -n 's/^torch==//p' constraints.txt)
TRITON ?= $(shell sed -n 's/^triton==//p' constraints.txt)
CONSTRAINTS := $(VENV)/constraints.txt

NATIVE := $(wildcard csrc/*.h csrc/*.cpp csrc/cpu/* csrc/cuda/*)
EMULATOR := $(wildcard tests/backends/emulator/* tests/backends/arm/*)
SANITIZED := build/sanitized
KERNEL_TESTS = $(BIN)/python -m pytest -q -p no:cacheprovider -m "not slow" \
	tests/backends/test_native.py tests/backends/test_grad_tol.py tests/backends/test_grad_tol_rule.py \
	tests/test_logits.py tests/test_logps_extremes.py
CLANG ?= clang++
ARM_CXX ?= aarch64-linux-gnu-g++
ARM_RUN ?= qemu-aarch64

OLD_TORCH ?= 2.10.0 2.11.0
OLD_TRITON ?= 3.6.0 3.7.1

PYTHON_OLDEST ?= python3.12
OLDEST := build/oldest
TESTS ?= tests

.PHONY: help demo picture screenshots test lint docs bench bench-env trainers serve deepspeed sanitize clang arm old-torch \
	old-triton oldest wheel hub-kernel clean

demo: $(VENV)/.installed  ## train and compare SFT, DPO and stepwise DPO
	$(BIN)/python -m examples.demo.run --output $(DEMO_OUTPUT)

picture: demo  ## the picture that README shows
	cp $(DEMO_OUTPUT)/comparison.png docs/demo.png

# light and wide, dark and narrow; Blink's preferredColorScheme is 0 for dark and 1 for light
screenshots: demo  ## the screenshots of a report that docs/report.md shows (needs chromium)
	$(CHROMIUM) --window-size=1200,1480 --blink-settings=preferredColorScheme=1 --screenshot=docs/report-wide.png \
		file://$(abspath $(DEMO_OUTPUT))/sdpo/report.html
	$(CHROMIUM) --window-size=390,1480 --blink-settings=preferredColorScheme=0 --screenshot=docs/report-narrow.png \
		file://$(abspath $(DEMO_OUTPUT))/sdpo/report.html

# one thread for each of the two workers, in the processes that tests start, too
test: $(VENV)/.installed  ## run the tests
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist loadgroup

lint: $(VENV)/.installed  ## check lint, format and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(NATIVE) $(EMULATOR)

# without network; it fails for a warning, such as a link that leads nowhere
docs: $(VENV)/.installed  ## build the documentation as a site into build/site
	$(BIN)/python -m docs.site.stage
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build

bench: $(VENV)/.installed  ## run a benchmark: make bench BENCH=accuracy
	$(BIN)/python -m benchmarks.$(BENCH)

bench-env: $(VENV)/.installed  ## install the rivals (TRL, Liger, CCE) and gguf
	$(BIN)/pip install -q --no-build-isolation -c $(CONSTRAINTS) -e ".[bench]"

# one of them: make trainers TRAINERS=llamafactory
trainers: $(VENV)/.installed  ## run other projects' trainers with our adapters: LLaMA-Factory, ms-swift, OpenRLHF, axolotl
	$(BIN)/python -m benchmarks.trainers $(TRAINERS) --json benchmarks/results/trainers-cpu.json --page

serve: $(VENV)/.installed  ## test generated pairs with `transformers serve`, a real server
	$(BIN)/pip install -q -c $(CONSTRAINTS) "transformers[serving]"
	$(BIN)/python -m pytest -q tests/stepwise/sources/test_transformers_serve.py

# torch is there already, so no CUDA packages come with it; nothing is compiled at installation
deepspeed: $(VENV)/.installed  ## install DeepSpeed into .venv and run its tests (it compiles one op first)
	DS_BUILD_OPS=0 $(BIN)/pip install -q --no-build-isolation -c $(CONSTRAINTS) deepspeed==0.19.8
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python -m pytest -q -p no:cacheprovider tests/stepwise/test_deepspeed.py

sanitize: $(VENV)/.installed  ## run the kernels' tests with the address and undefined-behaviour sanitizers
	SDPO_SANITIZE=1 $(BIN)/python setup.py -q build_ext --build-lib $(SANITIZED) --build-temp $(SANITIZED)/objects
	SDPO_NATIVE_LIBRARY=$(SANITIZED)/sdpo_kernels/_cpu.so LD_PRELOAD="$$(gcc -print-file-name=libasan.so) $$(gcc -print-file-name=libubsan.so)" \
		ASAN_OPTIONS=detect_leaks=0 $(KERNEL_TESTS)

# another compiler: CLANG=clang++-18
clang: $(VENV)/.installed  ## build with clang and run the kernels' tests with that library
	CXX=$(CLANG) CXXFLAGS=-Werror SDPO_CUDA=0 SDPO_REQUIRE_NATIVE=1 $(BIN)/python setup.py -q build_ext --build-lib build/clang --build-temp build/clang/objects
	SDPO_NATIVE_LIBRARY=build/clang/sdpo_kernels/_cpu.so $(KERNEL_TESTS)

# 64-bit ARM takes the base kernels; apt-get install g++-aarch64-linux-gnu qemu-user
arm: $(VENV)/.installed  ## compile for 64-bit ARM and run the kernels in qemu
	mkdir -p build/arm
	include="$$($(BIN)/python -c 'import importlib.util as u, pathlib as p; print(p.Path(u.find_spec("torch").origin).parent / "include")')"; \
	for source in csrc/ops.cpp $(wildcard csrc/cpu/*.cpp) tests/backends/arm/walk.cpp; do \
		$(ARM_CXX) -std=c++20 -O3 -fwrapv -fPIC -fopenmp-simd -fno-trapping-math -Wall -Werror -Wno-unused-parameter -Wno-maybe-uninitialized \
			-DTORCH_TARGET_VERSION=0x020a000000000000 -DSDPO_BUILT_FROM='"arm"' -isystem "$$include" -isystem "$$include/torch/csrc/api/include" \
			-c $$source -o build/arm/$$(basename $$source .cpp).o || exit 1; \
	done
	$(ARM_CXX) -static build/arm/walk.o build/arm/leaves.o build/arm/redo.o build/arm/tiles.o build/arm/base.o build/arm/chip.o -o build/arm/walk
	$(ARM_RUN) build/arm/walk

# downloads a wheel of up to 900 MB for each, without its CUDA packages
old-torch: $(VENV)/.installed  ## build against older torch versions and run the CPU kernels in them
	for version in $(OLD_TORCH); do $(BIN)/python -m tests.old_torch $$version build/old-torch || exit 1; done

old-triton: $(VENV)/.installed  ## compile the Triton kernels with older versions: registers, instructions
	for version in $(OLD_TRITON); do \
		folder=build/old-triton/$$version; \
		test -d $$folder || $(BIN)/pip install -q --no-deps --target $$folder triton==$$version || exit 1; \
		PYTHONPATH=$$folder:. TRITON_CACHE_DIR=$$folder/cache $(BIN)/python -m pytest -q -p no:cacheprovider \
			tests/backends/test_triton_compiles.py || exit 1; \
	done

# the library is the one of .venv, which serves every torch. A folder of tests: make oldest TESTS=tests/backends
oldest: $(VENV)/.installed $(OLDEST)/.installed  ## run the tests with the oldest packages, those of tests/oldest.txt
	OMP_NUM_THREADS=1 $(OLDEST)/bin/python -m pytest -q -n 2 --dist loadgroup -p no:cacheprovider $(TESTS)

# downloads torch's wheel of 530 MB, without its CUDA packages
$(OLDEST)/.installed: tests/oldest.txt tests/oldest.py pyproject.toml
	test -x $(OLDEST)/bin/python || $(PYTHON_OLDEST) -m venv $(OLDEST)
	$(OLDEST)/bin/python -m tests.oldest
	touch $@

# rewritten only when it changes: a different TORCH reinstalls, the same one does not
$(CONSTRAINTS): FORCE
	@mkdir -p $(VENV)
	@sed -e 's/^torch==.*/torch==$(TORCH)/' -e 's/^triton==.*/triton==$(TRITON)/' constraints.txt > $@.new
	@cmp -s $@.new $@ && rm $@.new || mv $@.new $@

# torch first: it is pinned, and everything after it is built and resolved against what is installed
$(VENV)/.installed: pyproject.toml $(CONSTRAINTS) setup.py $(NATIVE)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) || \
		{ echo "cannot make a virtual environment; on Debian: apt-get install python3-venv" >&2; rm -rf $(VENV); exit 1; }
	$(BIN)/python -m pip install -q --upgrade pip "setuptools>=77"
	$(BIN)/python -m pip install -q -c $(CONSTRAINTS) torch
	$(BIN)/python -m pip install -q --no-build-isolation -c $(CONSTRAINTS) -e ".[train,qlora,docs,dev]"
	touch $@

# with the CUDA library in it where nvcc is found
wheel: $(VENV)/.installed  ## build one wheel for every Python from 3.10 on
	$(BIN)/pip wheel -q --no-build-isolation --no-deps -w dist .

# downloads nothing and uploads nothing; `kernels` is not needed to build
hub-kernel: $(VENV)/.installed  ## lay the kernels out for Hugging Face's loader, `kernels`: build/hub-kernel
	$(BIN)/python -m tests.hub_kernel build/hub-kernel

clean:  ## remove everything built
	rm -rf $(VENV) build dist *.egg-info sdpo_kernels/*.so .pytest_cache .mypy_cache .ruff_cache .hypothesis

help:  ## list the targets
	@sed -n 's/^\([a-z-]*\):[^#]*## */make \1	/p' Makefile | expand -t 20

FORCE:
