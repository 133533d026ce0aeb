# Two commands: `make demo` and `make test`. Everything else is a part of them.
# The environment lives in .venv; torch comes as its CPU build, through constraints.txt.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
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

test: $(STAMP) lint
	$(BIN)/python -m pytest $(TESTS)

lint: $(STAMP)
	$(BIN)/ruff check src tests bench
	$(BIN)/ruff format --check src tests bench

bench: $(STAMP)
	$(BIN)/anchortp bench setup-vllm
	$(BIN)/anchortp bench grid --output bench-results $(BENCH)
	$(BIN)/anchortp bench report bench-results --output bench-results

# Exit status 5: no test was collected. There are none yet: devices are CPU devices so far.
gpu-check: $(STAMP)
	$(BIN)/python -m pytest tests/gpu || test $$? -eq 5

clean:
	rm -rf $(VENV) build dist src/*.egg-info
