# The index of commands: `make` lists them.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --no-deps --no-compile --progress-bar off
PIP_LOCKED := $(PIP) --require-hashes --requirement
TOO_OLD := "make env: the pinned versions need Python 3.11; type: make env PYTHON=python3.11"

.DEFAULT_GOAL := help
.PHONY: help env demo test lint docs bench gpu-check gpu-build gpu-test gpu-bench gpu-sanitize lock clean

help: ## list the commands
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1\t\2/p' $(MAKEFILE_LIST)

env: $(VENV)/installed $(VENV)/built ## make .venv with torch, detectron2 and fcos_d2 in it

# What is installed and what builds it is in the lock, so nothing comes without a known hash: some
# packages have no wheel, and pip would fetch any setuptools for them if the lock's were not there.
$(VENV)/installed: pyproject.toml requirements.lock tools/install_detectron2.py
	@$(PYTHON) -c 'import sys; sys.exit($(TOO_OLD) if sys.version_info < (3, 11) else 0)'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	sed -n '/^setuptools==/,/# via/p' requirements.lock | $(PIP_LOCKED) /dev/stdin
	$(PIP_LOCKED) requirements.lock --no-build-isolation
	$(BIN)/python tools/install_detectron2.py --no-deps
	$(PIP) --no-build-isolation --editable .
	$(BIN)/python -m pip check
	@touch $@

$(VENV)/built: $(VENV)/installed setup.py $(shell find csrc -type f)
	$(BIN)/python setup.py --quiet build_ext --inplace
	@touch $@

demo: env ## train FCOS on handwritten digits, evaluate it and draw what it found
	$(BIN)/python train_net.py --config-file configs/digits/fcos_R_18_FPN_digits.yaml
	$(BIN)/python tools/report.py output/digits

test: env lint ## run the tests, save the slow ones
	$(BIN)/python -m pytest -m "not slow"

CPP = $(shell find csrc tests -name '*.cpp' -o -name '*.cu' -o -name '*.h' -o -name '*.inl' -o -name '*.c')

lint: env ## check style
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/clang-format --dry-run -Werror $(CPP)

docs: env ## build the documentation site into site/
	$(BIN)/mkdocs build --quiet

bench: env ## measure the ops beside their peers, into benchmarks/results/
	$(BIN)/python -W ignore -m benchmarks

# The Python of .venv where there is one, else one that has torch, numpy, pytest and hypothesis.
GPU_PYTHON = $(firstword $(wildcard $(BIN)/python) $(PYTHON))

gpu-check: gpu-test gpu-bench gpu-sanitize ## on a GPU: the three below, of minutes each; make -k goes on after a failure
.NOTPARALLEL: gpu-check # gpu-bench wants the GPU for itself

gpu-build: ## on a GPU: build the kernels for it
	FCOS_D2_CUDA=1 $(GPU_PYTHON) setup.py --quiet build_ext --inplace

gpu-test: gpu-build ## on a GPU: run every kernel, then the tests of the ops, save the slow ones
	$(GPU_PYTHON) -m tests.ops.drive_kernels
	$(GPU_PYTHON) -m pytest -q -m "cuda and not slow" tests/ops

# One launch each of what takes longest, the first of the standard workload.
PROFILE = ncu --kill yes --launch-count 1 --set full --kernel-name regex:$(1)_kernel \
    $(GPU_PYTHON) -W ignore -m benchmarks --device cuda $(2)

gpu-bench: gpu-build ## on a GPU: measure the ops beside their peers; RESULTS=FOLDER writes the table there too
	$(GPU_PYTHON) -W ignore -m benchmarks --device cuda $(if $(RESULTS),--results $(RESULTS))
	-@if command -v ncu; then \
	    ($(call PROFILE,focal,sigmoid_focal_loss); \
	    $(call PROFILE,scan,select_candidates); \
	    $(call PROFILE,padded,select_candidates)) $(if $(RESULTS),| tee $(RESULTS)/ncu.txt); \
	else echo "make gpu-bench: no profiles, ncu is not installed"; fi

# Without torch's memory cache compute-sanitizer sees every access beyond a tensor. Of all kernels only
# ours, in the namespace fcos, are looked at, save by initcheck: torch's kernels write what ours read.
# make gpu-sanitize SANITIZERS=initcheck runs that one, which takes longer.
SANITIZERS = memcheck racecheck synccheck
SANITIZE = PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --error-exitcode 1 --tool $(1) \
    $(if $(filter-out initcheck,$(1)),--kernel-name kernel_substring=fcos) $(GPU_PYTHON) -m tests.ops.drive_kernels

gpu-sanitize: gpu-build ## on a GPU: look for bad accesses and races in the kernels
	@if ! command -v compute-sanitizer; then \
	    echo "make gpu-sanitize: skipped, compute-sanitizer is not installed"; \
	elif compute-sanitizer $(GPU_PYTHON) -c "import torch; torch.ones(1).cuda()" 2>&1 | grep "Device not supported"; then \
	    echo "make gpu-sanitize: skipped, compute-sanitizer cannot use this GPU, as on some virtual machines"; \
	else \
	    set -x; failed=0; \
	    $(foreach tool,$(SANITIZERS),$(call SANITIZE,$(tool)) || failed=1;) \
	    exit $$failed; \
	fi

# Keeps the versions that are there; UPGRADE=--upgrade, or UPGRADE="--upgrade-package NAME", takes the
# newest. Needs uv (pip install uv).
lock: ## write requirements.lock: a version and hashes for all that make env installs
	$(PYTHON) tools/install_detectron2.py --requirements | \
	    UV_CUSTOM_COMPILE_COMMAND="make lock" uv pip compile --quiet --universal --python-version 3.11 \
	    --generate-hashes --no-emit-index-url $(UPGRADE) --extra dev --output-file requirements.lock \
	    pyproject.toml -

clean: ## remove .venv and everything built; output/ stays
	rm -rf $(VENV) build dist site *.egg-info fcos_d2/*.so .pytest_cache .ruff_cache .hypothesis
