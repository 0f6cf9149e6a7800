# `make demo` and `make test` need Python 3.11 or 3.12 and nothing else installed.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: demo test test-slow lint kernels install clean

demo: install
	$(BIN)/kdav demo

test: install
	$(BIN)/python -m pytest -m "not slow"

# Whole runs killed, restarted and launched on two hosts: what takes minutes.
test-slow: install
	$(BIN)/python -m pytest -m slow

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# Compiles every Triton kernel for three GPU generations; no GPU is needed.
kernels: install
	$(BIN)/python -m kdav_fast.kernels.aot --targets sm_80,sm_90,sm_100

install: $(READY)

# uv installs the pinned set in parallel; pip is only used to get it.
$(READY): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt uv
	$(BIN)/uv pip install --quiet --python $(BIN)/python --constraint constraints.txt --editable '.[test]'
	touch $(READY)

clean:
	rm -rf $(VENV) build dist *.egg-info
