# The first that runs: a name on the PATH may be a shim of a version that is not installed.
FITS := import sys; sys.exit(sys.version_info[:2] not in ((3, 11), (3, 12)))
PYTHON ?= $(shell for name in python3.12 python3.11 python3; do \
  $$name -c '$(FITS)' 2>/dev/null && echo $$name && break; done)
VENV := .venv
BIN := $(VENV)/bin
LOCK := images/line/requirements.lock
STAMP := $(VENV)/.installed

.DEFAULT_GOAL := help
.PHONY: help install demo test test-fast lint format compile docs images release clean

help:  ## show this help
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 12

install: $(STAMP)  ## create .venv with the whole line in it, from the lock

# llama.cpp for the GGUF exports is compiled: a portable build (no instructions of this CPU alone)
# in few compilation units, with its converter beside the bindings.
export CMAKE_ARGS := -DGGML_NATIVE=OFF -DLLAVA_BUILD=OFF -DLLAMA_BUILD_TOOLS=OFF -DLLAMA_OPENSSL=OFF \
  -DCMAKE_PROJECT_llama.cpp_INCLUDE=$(CURDIR)/images/gguf/llama-cpp.cmake
export CMAKE_BUILD_PARALLEL_LEVEL ?= $(shell nproc 2>/dev/null || echo 2)

# pip compiles bytecode in one process; compileall takes all CPUs. A third of the code is OCI's SDK,
# of which only a dataset in that store imports a part. A package may hold files that are not Python.
PIP_INSTALL := $(BIN)/pip install --quiet --disable-pip-version-check --no-compile

$(STAMP): $(LOCK) pyproject.toml
	@test -n "$(PYTHON)" && $(PYTHON) -c '$(FITS)' || { \
	  echo "tuneline needs Python 3.11 or 3.12: install one, or name it: make PYTHON=/path/to/python3.12"; \
	  exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(PIP_INSTALL) $$(grep '^torch==' $(LOCK))
	$(PIP_INSTALL) --no-deps -r $(LOCK)
	$(PIP_INSTALL) --no-deps -e .
	$(BIN)/python -m compileall -qq -j 0 -x '/site-packages/oci/' $(VENV)/lib || true
	@touch $@

demo: $(STAMP)  ## run the whole line on an embedded small model, CPU only
	$(BIN)/tuneline run demo

# Tests start hundreds of processes: each would compile the line's modules again if none of them
# wrote the bytecode. tests/conftest.py puts the files in the order in which they are handed out.
PYTEST := OMP_NUM_THREADS=1 PYTHONDONTWRITEBYTECODE= $(BIN)/python -m pytest -q \
  -n logical --maxprocesses 8 --dist loadfile --no-loadscope-reorder

test: $(STAMP)  ## run the tests (CPU)
	$(PYTEST)

test-fast: $(STAMP)  ## run the tests that load no model and start no server; under a minute
	$(PYTEST) -m "not heavy and not gpu and not docker and not cluster and not slow"

lint: $(STAMP)  ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(STAMP)  ## let ruff format the code
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

compile: $(STAMP)  ## compile every shipped recipe to build/*.yaml
	@mkdir -p build
	@for recipe in pipelines/tuneline/pipelines/recipes/*.yaml; do \
	  $(BIN)/tuneline compile $$recipe -o build/$$(basename $$recipe) || exit 1; done

docs: $(STAMP)  ## write docs/recipe.md and docs/components from the schema and the components
	@mkdir -p docs
	$(BIN)/tuneline schema --markdown > docs/recipe.md
	$(BIN)/python -m tuneline.pipelines.component_reference docs/components

SETS ?= light publish train evaluate gguf gptq
TORCH ?= cuda
VERSION = $(shell sed -n 's/VERSION = "\(.*\)"/\1/p' components/tuneline/version.py)

images:  ## build the container images; SETS="light train", TORCH=cpu, BUILD_ARGS=...
	@for set in $(SETS); do \
	  foundation=$$(grep -qx torch images/$$set/requirements.in && echo torch || echo bare); \
	  docker build -f images/Dockerfile $(BUILD_ARGS) --build-arg SET=$$set \
	    --build-arg FOUNDATION=$$foundation --build-arg TORCH=$(TORCH) \
	    --build-arg VERSION=$(VERSION) --build-arg REVISION=$$(git rev-parse --short HEAD) \
	    -t localhost/tuneline/$$set:$(VERSION) . || exit 1; \
	done
	@docker image ls 'localhost/tuneline/*'

# docs/releases.md says what is in dist/. The programs that build it come from images/tools.
IMAGES ?= yes
release:  ## build a release in dist/; IMAGES=no, REGISTRY=..., COSIGN_KEY=... (docs/releases.md)
	@test -n "$(PYTHON)" && $(PYTHON) -c '$(FITS)' || { \
	  echo "a release needs Python 3.11 or 3.12: install one, or name it: make PYTHON=..."; exit 1; }
	@PYTHONPATH=images/tools:components $(PYTHON) -m release --images='$(IMAGES)' --sets='$(SETS)' \
	  --torch='$(TORCH)' --build-args='$(BUILD_ARGS)' --registry='$(REGISTRY)'

clean:  ## remove the environment and what builds leave
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache
