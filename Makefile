# `make demo` and `make test` need Python 3.11 or 3.12 and nothing else installed.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Processes that the tests are shared out to, whole files where they are slow. Each has one thread and takes up to 2 GB.
WORKERS ?= 2
READY := $(VENV)/.ready

# What `make bench` measures: CIFAR is train/CLASS/*.jpg and test/CLASS/*.jpg, PHOTOS a folder of class folders.
CIFAR ?= data/cifar10-jpeg
PHOTOS ?= data/photographs
RUN ?= $(BIN)/python
RESULTS ?= benchmarks/results

# Python keeps what it has compiled, also where the environment says that it shall not: else each of the hundreds of
# processes that the tests start compiles the sources of PyTorch anew, which takes longer than what most of them do.
export PYTHONDONTWRITEBYTECODE :=

.PHONY: demo test test-slow lint kernels bench bench-gpu install clean

demo: install
	$(BIN)/kdav demo

test: install
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal -m "not slow"

# Whole runs killed, restarted and launched on two hosts: what takes minutes.
test-slow: install
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile -m slow

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# Compiles every Triton kernel for three GPU generations; no GPU is needed.
kernels: install
	$(BIN)/python -m kdav_fast.kernels.aot --targets sm_80,sm_90,sm_100

# Every CPU preset, one after another on an otherwise idle machine. Accuracy takes hours, and goes on where it was
# stopped. The report is benchmarks/results/report.html; docs/benchmarks.md shows its summary.
bench: install
	@for folder in "$(CIFAR)/train" "$(PHOTOS)"; do test -d "$$folder" || { echo "make bench: no folder $$folder; \
	give both: make bench CIFAR=FOLDER PHOTOS=FOLDER" >&2; exit 2; }; done
	$(RUN) benchmarks/loss_kernel.py --device cpu
	$(RUN) benchmarks/data_pipeline.py --device cpu --root $(PHOTOS)
	$(RUN) benchmarks/reading.py --root $(PHOTOS)
	$(RUN) benchmarks/training_step.py --device cpu --root $(PHOTOS)
	$(RUN) benchmarks/method_costs.py --device cpu
	$(RUN) benchmarks/scale.py --device cpu
	$(RUN) benchmarks/accuracy.py --device cpu --root $(CIFAR)
	$(RUN) benchmarks/method_accuracy.py --device cpu --root $(CIFAR) --teacher runs/accuracy/teacher
	$(RUN) benchmarks/summary.py

# Everything for one GPU, part by part; what fails or takes too long is said, and the rest goes on. The same command goes
# on from what is there. With a Python that has all packages: make bench-gpu RUN=python CIFAR=FOLDER PHOTOS=FOLDER
# RESULTS=FOLDER TEACHER=FILE PARTS="check loss_kernel"
bench-gpu:
	CIFAR=$(CIFAR) PHOTOS=$(PHOTOS) RESULTS=$(RESULTS) $(RUN) benchmarks/gpu.py $(if $(TEACHER),--teacher $(TEACHER)) $(PARTS)

install: $(READY)

# uv installs the pinned set in parallel; pip is only used to get it.
$(READY): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt uv
	$(BIN)/uv pip install --quiet --python $(BIN)/python --constraint constraints.txt --editable '.[test]'
	touch $(READY)

clean:
	rm -rf $(VENV) build dist *.egg-info
