# Everything from a fresh clone, with nothing but Python 3.11 to 3.13, a C++ compiler and make. `make help` lists it.
#
# Settings, as `make NAME=value`: PYTHON (which one to use), VENV (the environment's folder), TORCH and TRITON (what to
# install) and DALLE_KERNELS_CUDA (auto, on or off: see setup.py); for `make bench` also BENCH, such as
# BENCH='attention --rounds 3', for `make gates` UPDATE=1, CANDIDATES=1 or FUZZ=1 (what random calls launch, an hour or
# two), for `make tune` TUNE, such as TUNE=float16, and for `make gpu` GPU, such as GPU='tests sanitizers'. Without a
# network `make gpu VENV=...` builds into an environment that holds torch; what else that lacks pip finds by
# PIP_NO_INDEX=1 and PIP_FIND_LINKS=folder of wheels.
SHELL := /bin/sh
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

VENV ?= .venv
PYTHON ?= $(shell for python in python3 python3.13 python3.12 python3.11; do \
	  $$python -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null \
	    && echo $$python && break; done)
NVIDIA_DRIVER := $(wildcard /proc/driver/nvidia/version)
# Without a GPU the release that this project is tested with; with one, whatever pip finds best among those it supports.
TORCH ?= $(if $(NVIDIA_DRIVER),torch>=2.11$(COMMA)<2.14,torch==2.13.0)
COMMA := ,
# Triton comes with a torch for GPUs; without one this release compiles the kernels that tests/gates holds to account.
TRITON ?= $(if $(NVIDIA_DRIVER),,$(if $(filter Linux,$(shell uname -s)),triton==3.6.0))
export DALLE_KERNELS_CUDA ?= auto

BIN := $(VENV)/bin
RIVALS := $(VENV)/rivals
BUILD_INPUTS := setup.py pyproject.toml CMakeLists.txt $(shell find csrc -type f)
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: help demo test sanitize emulate gates tune bench lint gpu build clean FORCE

help:
	@echo 'make demo   draw a labelled grid of pictures with the shipped model'
	@echo 'make test   run the tests'
	@echo 'make sanitize  check the kernels for accesses out of bounds and undefined operations'
	@echo 'make emulate  hold the AVX-512 kernels to the error rule on any AVX2 processor, by SIMDe (SIMDE=folder of simde/)'
	@echo 'make gates  compile the kernels for sm_80 and sm_90 and check registers, spills and tensor-core instructions'
	@echo 'make tune   measure the Triton kernels in every candidate configuration, on an NVIDIA GPU'
	@echo 'make bench  measure the kernels against their rivals into bench/results/ and the README'
	@echo 'make lint   check style and formatting'
	@echo 'make gpu    build for, check on and measure an NVIDIA GPU'
	@echo 'make build  only make the environment $(VENV) and build into it; the others do so first'
	@echo 'make clean  remove what was built, but for the environment'

demo: build
	@$(BIN)/dalle demo

# Files go in their own order: by how many tests they have, those that compile for minutes would come last.
test: build
	@OMP_NUM_THREADS=$${OMP_NUM_THREADS:-2} $(BIN)/python -m pytest -q -n auto --maxprocesses 4 --dist loadfile \
	  --no-loadscope-reorder

bench: build $(RIVALS)/.installed
	@PYTHONPATH=$(abspath $(RIVALS)) $(BIN)/python bench/compare.py $(BENCH)
	@$(BIN)/python bench/roofline.py
	@$(BIN)/python bench/tables.py

sanitize: build
	@OMP_NUM_THREADS=$${OMP_NUM_THREADS:-2} $(BIN)/python tests/sanitize.py

emulate: build
	@OMP_NUM_THREADS=$${OMP_NUM_THREADS:-2} $(BIN)/python tests/emulate.py $(SIMDE)

# The CUDA kernels are judged as they are built, wherever nvcc is.
gates: export DALLE_KERNELS_CUDA := $(patsubst auto,$(if $(shell command -v nvcc),on,auto),$(DALLE_KERNELS_CUDA))
gates: build
ifneq ($(FUZZ),)
	@$(BIN)/python tests/gates_fuzz.py
else
	@$(BIN)/python tests/gates.py $(if $(UPDATE),--update) $(if $(CANDIDATES),--candidates)
	@$(BIN)/python tests/cuda_gates.py $(if $(UPDATE),--update)
endif

tune: build
	@$(BIN)/python bench/tune.py $(TUNE)

lint: build
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .

# The minutes of `make gpu` begin before it builds, for the GPU at hand alone.
gpu: BEGAN := $(shell date +%s)
gpu:
ifeq ($(NVIDIA_DRIVER),)
	@echo 'make gpu: no NVIDIA driver is loaded here, so there is nothing to build for, check on or measure; stopping.'
else
	@architecture=$$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null | head -n 1 | tr -d . | sed 's/^90$$/90a/'); \
	  $(MAKE) --no-print-directory build DALLE_KERNELS_CUDA=on \
	  DALLE_KERNELS_CUDA_ARCHITECTURES="$${DALLE_KERNELS_CUDA_ARCHITECTURES:-$${architecture:-80;90a}}"
	@grep -v '^#' bench/rivals.txt | timeout 60 xargs -d '\n' -n 1 $(BIN)/python -m pip install -q --no-deps --upgrade --target $(RIVALS) 2>/dev/null \
	  || echo 'make gpu: the rivals of bench/rivals.txt are not all to be had here; going on without'
	@PYTHONPATH=$(abspath $(RIVALS)) $(BIN)/python bench/gpu.py --since $(BEGAN) $(GPU)
endif

build: $(VENV)/.built

# The environment with torch; made again only when asked for another torch.
$(VENV)/.torch: $(VENV)/.torch-wanted
	@test -n '$(PYTHON)' || { echo 'dalle-kernels: expected Python 3.11 to 3.13, found none;' \
	  'install one, or name it: make PYTHON=/path/to/python3'; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo 'dalle-kernels: expected Python 3.11' \
	  "to 3.13, got $$($(PYTHON) --version 2>&1 | head -1) from $(PYTHON); name another: make PYTHON=/path/to/python3"; exit 1; }
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || { echo 'dalle-kernels: this Python lacks the modules venv' \
	  'and ensurepip; install them (on Debian and Ubuntu: apt install python3-venv)'; exit 1; }
	@command -v $${CXX:-c++} >/dev/null || command -v g++ >/dev/null || command -v clang++ >/dev/null || { echo \
	  'dalle-kernels: expected a C++ compiler, found none (on Debian and Ubuntu: apt install g++)'; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q '$(TORCH)' $(TRITON)
	@touch $@

# Build isolation would fetch the build tools anew and compile everything again each time.
$(VENV)/.built: $(VENV)/.torch $(VENV)/.cuda-wanted $(BUILD_INPUTS)
	$(BIN)/python -m pip install -q 'setuptools>=77' 'pybind11>=3.0' 'cmake>=3.24' ninja
	PYTHONWARNINGS='ignore:Editable installation' $(BIN)/python -m pip install -q --no-build-isolation -e '.[data,figures,test,bench,lint]'
	@touch $@

# What the benchmarks compare with, apart from the environment.
$(RIVALS)/.installed: bench/rivals.txt $(VENV)/.torch
	$(BIN)/python -m pip install -q --no-deps --upgrade --target $(RIVALS) -r bench/rivals.txt
	@touch $@

# Files that hold a setting and change only when it does.
$(VENV)/.torch-wanted: FORCE
	@mkdir -p $(VENV) && echo '$(TORCH) $(TRITON)' | cmp -s - $@ || echo '$(TORCH) $(TRITON)' >$@
$(VENV)/.cuda-wanted: FORCE
	@mkdir -p $(VENV) && echo '$(DALLE_KERNELS_CUDA)' | cmp -s - $@ || echo '$(DALLE_KERNELS_CUDA)' >$@

clean:
	rm -rf build dist *.egg-info dalle_kernels/_cpu.*.so dalle_kernels/_cuda.*.so $(VENV)/.built
