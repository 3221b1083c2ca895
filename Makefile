# `make` alone prints what there is.
PY := .venv/bin/python
# The shapes and types written in the layers' and models' signatures are checked while their tests run.
TYPED := --jaxtyping-packages=lfm.layers,lfm.models,beartype.beartype

.DEFAULT_GOAL := help
.PHONY: help setup demo check test test-full test-gpu bench

help: ## print this
	@grep -E '^[a-z-]+:.*## ' Makefile | sed -E 's/^([a-z-]+):.*## /\1\t/' | expand -t 12

setup: ## make .venv with everything the project needs (the targets below do it by themselves)
	@.ci/setup

demo: setup ## text found on this machine -> shards -> a trained tiny LFM, its loss plot, its compression, a sample
	@$(PY) launch/demo.py

check: setup ## lint, types, import contracts
	@.venv/bin/ruff check .
	@.venv/bin/ruff format --check .
	@.venv/bin/pyright
	@.venv/bin/lint-imports

test: setup ## the CPU tests that take minutes
	@$(PY) -m pytest -q $(TYPED) -m "not slow"

test-full: setup ## everything a CPU can run
	@$(PY) -m pytest -q $(TYPED)

test-gpu: setup ## the tests that need a GPU
	@$(PY) -m pytest -q -m gpu

bench: setup ## benchmarks against floors and peers; results in benchmarks/results/
	@$(PY) benchmarks/attention.py
