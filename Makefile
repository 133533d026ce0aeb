# Two commands: `make demo` and `make test`. Everything else is a part of them.
# The environment lives in .venv; torch in the version of constraints.txt, as the CPU build where the index has one.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
GPU_PYTHON ?= $(or $(wildcard $(BIN)/python),$(PYTHON))
STAMP  := $(VENV)/.anchortp-ready

export OMP_NUM_THREADS ?= 1

.PHONY: demo test lint bench gpu-check clean

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[demo,dev,bench]'
	touch $@

demo: $(STAMP)
	$(BIN)/anchortp demo $(DEMO)

# Tests that start no processes of ours share the cores; those that do have them for themselves.
test: $(STAMP) lint
ifdef TESTS
	$(BIN)/python -m pytest $(TESTS)
else
	$(BIN)/python -m pytest --numprocesses auto --dist loadfile tests/pure tests/cpu
	$(BIN)/python -m pytest tests/procs tests/gpu
endif

lint: $(STAMP)
	$(BIN)/ruff check src tests bench
	$(BIN)/ruff format --check src tests bench

bench: $(STAMP)
	$(BIN)/anchortp bench setup-vllm
	$(BIN)/anchortp bench grid --output bench-results $(BENCH)
	$(BIN)/anchortp bench report bench-results --output bench-results

# What needs a GPU, in one command (docs/cuda.md). Installs nothing: the machine may have no network. Without a GPU it
# says so and is content.
gpu-check:
	PYTHONPATH=src:$$PYTHONPATH $(GPU_PYTHON) -m bench.gpu_check $(GPU_CHECK)

clean:
	rm -rf $(VENV) build dist src/*.egg-info
