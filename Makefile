# `make help` lists the targets. DEVICE=cuda installs vLLM for CUDA; VENV=DIR puts it elsewhere.
VENV ?= .venv
DEVICE ?= cpu
BIN := $(VENV)/bin
CODE := flux_vllm training demo deploy benchmarks tools tests
PYTEST_ARGS ?=
# Test files run side by side; each file is one worker's, so that its tests share an engine.
JOBS ?= 2
PYTEST := $(BIN)/python -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder

export VENV DEVICE

.PHONY: help install demo test test-all test-gpu bench style quality build clean
.DEFAULT_GOAL := help

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

install: ## make .venv with vLLM and Flux-vLLM (DEVICE=cuda for NVIDIA GPUs)
	@bash tools/install.sh

demo: install ## serve a small real model with flux, ask it, show the routes
	@$(BIN)/python -m demo

test: install ## the tests that need no GPU (JOBS=2 at once; PYTEST_ARGS="-k name" to choose)
	@$(PYTEST) -m "not gpu and not long" $(PYTEST_ARGS)

test-all: install ## those, and long lengths and rarer cases, as CI runs them
	@$(PYTEST) -m "not gpu" $(PYTEST_ARGS)

test-gpu: install ## the tests that need a GPU
	@$(BIN)/python -m pytest -m gpu $(PYTEST_ARGS)

bench: install ## the benchmarks that this machine can run (benchmarks/README.md)
	@[ -d models/SmolLM2-135M-Instruct ] || $(BIN)/flux-vllm sample-model models/SmolLM2-135M-Instruct
	@$(BIN)/python -m benchmarks run --out runs/bench

style: install ## format the code and fix what ruff can fix
	@$(BIN)/ruff check --fix-only --quiet $(CODE)
	@$(BIN)/ruff format $(CODE)

quality: install ## ruff and mypy, as CI runs them
	@$(BIN)/ruff check $(CODE)
	@$(BIN)/ruff format --check $(CODE)
	@$(BIN)/mypy

build: install ## the wheel and the source archive, in dist/
	@$(BIN)/python -m build

clean: ## remove what the build and the tools left
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
