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
TORCH_VERSION := $(shell sed -n 's/^torch==\([^ ]*\).*/\1/p' constraints/default.txt)
UNAME := $(shell uname -s)

.DEFAULT_GOAL := help
.PHONY: help setup demo demo-llm test test-gpu test-oldest test-verl test-megatron test-torchtitan test-trl-own fuzz mutants bench bench-gpu lint format
.PHONY: lock audit

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

test-oldest: .venv-oldest/.stamp ## tests on the oldest versions allowed, in an environment of its own
	TRITON_INTERPRET=1 .venv-oldest/bin/python -m pytest -n $(JOBS) -m "not slow" tests/ops \
		tests/losses/test_mask.py tests/losses/test_paec.py tests/losses/test_compile.py tests/integrations \
		tests/train/models tests/train/report tests/train/tasks tests/test_cli.py

test-verl: .venv-verl/.stamp ## the tests of PAEC in verl, in an environment of its own (Python 3.11 or 3.12)
	.venv-verl/bin/python -m pytest -n $(JOBS) --dist loadfile tests/integrations_verl

test-megatron: .venv-megatron/.stamp ## the tests of a head that Megatron-Core splits over ranks, in an environment of its own
	.venv-megatron/bin/python -m pytest tests/integrations_split/test_megatron.py

test-torchtitan: .venv-torchtitan/.stamp ## the same of one that torchtitan splits
	.venv-torchtitan/bin/python -m pytest tests/integrations_split/test_torchtitan.py

fuzz: .venv/.stamp ## every property on thousands of drawn inputs, of another SEED if it is given: bench_results/trust
	.venv/bin/python -m pytest tests/fuzz -n $(JOBS) --dist worksteal --timeout 7200 \
		--hypothesis-profile fuzz --hypothesis-seed $(SEED) --fuzz-report bench_results/trust/fuzz.json
	PAEC_FUZZ_EXAMPLES=2000 .venv/bin/python -m pytest tests/test_refusals.py -n $(JOBS) --timeout 3600

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

lock: .venv-tools/.stamp ## write constraints/*.txt, with hashes; UPGRADE='-P numpy' takes a newer numpy
	$(LOCK) $(UPGRADE) constraints/default.in --output-file constraints/default.txt
	$(LOCK) $(UPGRADE) constraints/verl.in --output-file constraints/verl.txt
	$(LOCK) $(UPGRADE) constraints/megatron.in --output-file constraints/megatron.txt
	$(LOCK) $(UPGRADE) constraints/torchtitan.in --output-file constraints/torchtitan.txt
	$(LOCK) $(UPGRADE) constraints/tools.in --output-file constraints/tools.txt
	$(LOCK) $(UPGRADE) --resolution lowest-direct constraints/oldest.in --output-file constraints/oldest.txt
ifdef TORCH_CPU_INDEX
	sed -n "s/^torch==\([^ ]*\).*/torch==\1+cpu ; sys_platform == 'linux'/p" constraints/default.txt | \
		$(LOCK) --no-deps --default-index "$(TORCH_CPU_INDEX)" - --output-file constraints/torch-cpu.txt
endif

audit: .venv-tools/.stamp ## look for known vulnerabilities that constraints/audit.md does not explain
	@for list in default verl megatron torchtitan oldest tools; do echo "$$list"; \
		.venv-tools/bin/pip-audit --strict --disable-pip --require-hashes --requirement constraints/$$list.txt \
			$$(grep '^- ' constraints/audit.md | grep -oE '(PYSEC|CVE|GHSA)-[0-9a-z-]+' | sed 's/^/--ignore-vuln /') \
			|| exit 1; done

# Every version is exact, for each Python and system, and has the hashes of all its files.
LOCK = UV_CUSTOM_COMPILE_COMMAND="make lock" .venv-tools/bin/uv --config-file constraints/uv.toml pip compile --quiet \
	--universal --python-version 3.11 --generate-hashes --no-annotate --no-emit-package paec-kernels

# Packages come from these lists: of these versions, from files with these hashes, or not at all. What comes as source
# is built by the list's own setuptools.
INSTALL = -m pip install --quiet --require-hashes --no-deps --no-build-isolation
CPU_INDEX = $(if $(TORCH_CPU_INDEX),--extra-index-url "$(TORCH_CPU_INDEX)")

# $(call new_venv,DIR): an empty virtual environment.
define new_venv
	@test -n "$(PYTHON)" || { echo "Python 3.11 or newer not found; set PYTHON=/path/to/python3" >&2; exit 1; }
	$(PYTHON) -m venv $(1)
endef

# $(call install_list,DIR,LIST)
define install_list
	sed -n '/^setuptools==/,/[^\\]$$/p' $(2) | $(1)/bin/python $(INSTALL) --requirement /dev/stdin
	$(1)/bin/python $(INSTALL) --requirement $(2)
endef

# $(call install_cpu_torch,DIR): on macOS the list's torch is a CPU build already.
define install_cpu_torch
$(1)/bin/python $(INSTALL) $(CPU_INDEX) --requirement constraints/torch-cpu.txt
endef

# $(call install_package,DIR): without an index, since the list must hold all that the package asks for.
define install_package
	$(1)/bin/python -m pip install --quiet --no-index --no-build-isolation --editable '.[$(EXTRAS)]'
endef

.venv/.stamp: EXTRAS = demo,trl,bench,dev
.venv/.stamp: pyproject.toml constraints/default.txt constraints/torch-cpu.txt
	$(call new_venv,.venv)
	@if [ $(TORCH) = cpu ] && { [ $(UNAME) != Linux ] || .venv/bin/python -m pip index versions torch $(CPU_INDEX) \
			2>/dev/null | grep -qF "$(TORCH_VERSION)+cpu"; }; then \
		cp constraints/default.txt .venv/list.txt; \
	else \
		[ $(TORCH) != cpu ] || echo "pip finds no CPU build of torch $(TORCH_VERSION), so the build with CUDA follows," \
			"several GB. To avoid it, stop and set TORCH_CPU_INDEX to the index of CPU wheels that PyTorch's" \
			"installation page names."; \
		sed -e '/^torch==/,/[^\\]$$/d' -e '/^triton==/,/[^\\]$$/d' constraints/default.txt > .venv/list.txt; \
	fi
	@! grep -q '^torch==' .venv/list.txt || { $(call install_cpu_torch,.venv); }
	$(call install_list,.venv,.venv/list.txt)
	# The build with CUDA demands CUDA's libraries and the one triton it was released with: pip's choice, unhashed.
	@grep -q '^torch==' .venv/list.txt || .venv/bin/python -m pip install --quiet "torch==$(TORCH_VERSION)"
	$(call install_package,.venv)
	@touch $@

.venv-verl/.stamp: EXTRAS = verl,test
.venv-megatron/.stamp .venv-torchtitan/.stamp: EXTRAS = test
.venv-verl/.stamp .venv-megatron/.stamp .venv-torchtitan/.stamp: .venv-%/.stamp: pyproject.toml constraints/%.txt \
		constraints/torch-cpu.txt
	$(call new_venv,.venv-$*)
	$(call install_cpu_torch,.venv-$*)
	$(call install_list,.venv-$*,constraints/$*.txt)
	$(call install_package,.venv-$*)
	@touch $@

.venv-oldest/.stamp: pyproject.toml constraints/oldest.txt constraints/cuda_stand_ins.py
	$(call new_venv,.venv-oldest)
	$(call install_list,.venv-oldest,constraints/oldest.txt)
	.venv-oldest/bin/python constraints/cuda_stand_ins.py
	.venv-oldest/bin/python -m pip install --quiet --no-deps --no-build-isolation --editable .
	@touch $@

.venv-tools/.stamp: constraints/tools.txt
	$(call new_venv,.venv-tools)
	.venv-tools/bin/python $(INSTALL) --requirement constraints/tools.txt
	@touch $@
