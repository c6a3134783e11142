# `make` lists the commands.

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

env: $(VENV)/installed $(VENV)/built ## create .venv with torch, detectron2 and fcos_d2

# The lock contains all packages and their build tools, so everything is verified by its hash: some
# packages have no wheel, and pip would fetch any setuptools to build them.
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

demo: env ## train FCOS on handwritten digits, evaluate it and draw its detections
	$(BIN)/python train_net.py --config-file configs/digits/fcos_R_18_FPN_digits.yaml
	$(BIN)/python tools/report.py output/digits

test: env lint ## run all but the slow tests
	$(BIN)/python -m pytest -m "not slow"

CPP = $(shell find csrc tests -name '*.cpp' -o -name '*.cu' -o -name '*.h' -o -name '*.inl' -o -name '*.c')

lint: env ## check style
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/clang-format --dry-run -Werror $(CPP)

docs: env ## build the documentation site into site/
	$(BIN)/mkdocs build --quiet

bench: env ## compare the ops with their peers, into benchmarks/results/
	$(BIN)/python -W ignore -m benchmarks

# The Python of .venv if it exists, else PYTHON, which needs torch, numpy, pytest and hypothesis.
GPU_PYTHON = $(firstword $(wildcard $(BIN)/python) $(PYTHON))

gpu-check: gpu-test gpu-bench gpu-sanitize ## on a GPU: gpu-test, gpu-bench and gpu-sanitize, minutes each; make -k continues after a failure
.NOTPARALLEL: gpu-check # gpu-bench needs the GPU for itself

gpu-build: ## on a GPU: build the kernels for it
	FCOS_D2_CUDA=1 $(GPU_PYTHON) setup.py --quiet build_ext --inplace

gpu-test: gpu-build ## on a GPU: run every kernel, then all but the slow tests of the ops
	$(GPU_PYTHON) -m tests.ops.drive_kernels
	$(GPU_PYTHON) -m pytest -q -m "cuda and not slow" tests/ops

# Profiles one launch each of the slowest kernels, the first in the standard workload.
PROFILE = ncu --kill yes --launch-count 1 --set full --kernel-name regex:$(1)_kernel \
    $(GPU_PYTHON) -W ignore -m benchmarks --device cuda $(2)

gpu-bench: gpu-build ## on a GPU: compare the ops with their peers; RESULTS=FOLDER also writes the table there
	$(GPU_PYTHON) -W ignore -m benchmarks --device cuda $(if $(RESULTS),--results $(RESULTS))
	-@if command -v ncu; then \
	    ($(call PROFILE,loss,sigmoid_focal_loss); \
	    $(call PROFILE,scan,select_candidates); \
	    $(call PROFILE,padded,select_candidates)) $(if $(RESULTS),| tee $(RESULTS)/ncu.txt); \
	else echo "make gpu-bench: no profiles, ncu is not installed"; fi

# Without torch's caching allocator, compute-sanitizer sees every out-of-bounds access. It checks only
# our kernels, in the namespace fcos; initcheck checks all, as torch's kernels write what ours read.
# make gpu-sanitize SANITIZERS=initcheck runs initcheck, which takes longer.
SANITIZERS = memcheck racecheck synccheck
SANITIZE = PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --error-exitcode 1 --tool $(1) \
    $(if $(filter-out initcheck,$(1)),--kernel-name kernel_substring=fcos) $(GPU_PYTHON) -m tests.ops.drive_kernels

gpu-sanitize: gpu-build ## on a GPU: check the kernels for invalid accesses and races
	@if ! command -v compute-sanitizer; then \
	    echo "make gpu-sanitize: skipped, compute-sanitizer is not installed"; \
	elif compute-sanitizer $(GPU_PYTHON) -c "import torch; torch.ones(1).cuda()" 2>&1 | grep "Device not supported"; then \
	    echo "make gpu-sanitize: skipped, compute-sanitizer cannot use this GPU, as on some virtual machines"; \
	else \
	    set -x; failed=0; \
	    $(foreach tool,$(SANITIZERS),$(call SANITIZE,$(tool)) || failed=1;) \
	    exit $$failed; \
	fi

# Keeps the locked versions; UPGRADE=--upgrade, or UPGRADE="--upgrade-package NAME", takes the newest.
# Needs uv (pip install uv).
lock: ## write requirements.lock: versions and hashes of everything that make env installs
	$(PYTHON) tools/install_detectron2.py --requirements | \
	    UV_CUSTOM_COMPILE_COMMAND="make lock" uv pip compile --quiet --universal --python-version 3.11 \
	    --generate-hashes --no-emit-index-url $(UPGRADE) --extra dev --output-file requirements.lock \
	    pyproject.toml -

clean: ## remove .venv and everything built, except output/
	rm -rf $(VENV) build dist site *.egg-info fcos_d2/*.so .pytest_cache .ruff_cache .hypothesis
