# `make` alone prints what there is.
PY := .venv/bin/python
# Test processes of `make test`; a test file stays in one of them.
WORKERS := 2
# The shapes and types written in the layers' and models' signatures are checked while their tests run.
TYPED := --jaxtyping-packages=lfm.layers,lfm.models,beartype.beartype

# Those of docs/kernels.md.
OPS := $(filter-out case,$(basename $(notdir $(wildcard benchmarks/ops/*.py))))

.DEFAULT_GOAL := help
.PHONY: help setup demo check test test-full test-gpu test-slurm golden bench

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
	@$(PY) -m pytest -q $(TYPED) -m "not slow and not slurm and not alone" --numprocesses $(WORKERS) --dist loadfile
	@$(PY) -m pytest -q -m "alone and not slow and not slurm"

test-full: setup ## everything a CPU can run
	@$(PY) -m pytest -q $(TYPED)

test-gpu: setup ## the tests that need a GPU
	@$(PY) -m pytest -q -m gpu

test-slurm: setup ## the job scripts on a throw-away Slurm; needs the packages slurm-wlm and munge
	@PATH=$$PATH:/usr/sbin; command -v slurmctld >/dev/null && command -v munged >/dev/null || \
		{ echo "error: no Slurm here; apt-get install --no-install-recommends slurm-wlm munge" >&2; exit 2; }
	@$(PY) -m pytest -q -m slurm

golden: setup ## write the golden runs anew; only in a commit that says which numbers change, and why
	@$(PY) tests/golden/write.py

bench: setup ## benchmarks against floors and peers; results in benchmarks/results/
	@$(PY) benchmarks/attention.py
	@for op in $(OPS); do $(PY) launch/bench.py --op $$op --out benchmarks/results/op_$$op.json || exit; done
