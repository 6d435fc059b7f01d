# `make demo` and `make test` set up a fresh machine themselves; the rest are their parts.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
COMPILED := $(VENV)/.compiled
RESULTS ?= benchmarks/results/latest

.PHONY: demo test install lint test-cpu test-interpreter test-aot bench clean

demo: install
	$(BIN)/resnet-fast demo

test: lint test-cpu test-interpreter test-aot

install: $(INSTALLED) $(COMPILED)

$(INSTALLED): pyproject.toml setup.py
	$(PYTHON) -m venv $(VENV)
	RESNET_FAST_NO_NATIVE=1 $(BIN)/python -m pip install --quiet --editable '.[dev]' --config-settings editable_mode=compat
	touch $@

# The C++ kernels alone, so that a changed source does not set up everything again. Without a compiler this only warns.
$(COMPILED): $(INSTALLED) $(wildcard kernels/native/src/*)
	$(BIN)/python setup.py --quiet build_ext --inplace --build-lib $(VENV)/build --build-temp $(VENV)/build
	touch $@

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The three lanes run in processes of their own: Triton's interpreter and its compiler cannot share one.
test-cpu: install
	$(BIN)/python -m pytest tests/cpu

test-interpreter: install
	TRITON_INTERPRET=1 $(BIN)/python -m pytest tests/interpreter

test-aot: install
	$(BIN)/python -m pytest tests/aot

# Needs an idle machine; takes about ten minutes.
bench: install
	mkdir -p benchmarks/results
	$(BIN)/resnet-fast bench --model resnet18 --model resnet50 --batch 1 --batch 16 --json $(RESULTS).json
	$(BIN)/python benchmarks/plot.py $(RESULTS).json $(RESULTS).svg

clean:
	rm -rf $(VENV) build dist *.egg-info runs
