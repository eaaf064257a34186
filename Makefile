# Two commands do everything on a fresh machine: `make demo` and `make test`.
# PYTHON chooses the interpreter (3.10, 3.11 or 3.12).
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip --disable-pip-version-check

.DEFAULT_GOAL := help
.PHONY: help install demo test test-fast test-slurm gpu-proof lint format reference clean

help: ## Show this list.
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/  make \1\t\2/' | expand -t 18

# torch first: the build of deepspeed reads its version. DS_BUILD_OPS=0 compiles no kernel, so no compiler is needed.
$(VENV)/.installed: requirements.txt pyproject.toml
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(0 if (3, 10) <= v <= (3, 12) else f"Python 3.10 to 3.12 is needed, this is {v[0]}.{v[1]}: call make with PYTHON=/path/to/python3.11")'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet --progress-bar off $$(grep -E '^torch==' requirements.txt) setuptools wheel
	DS_BUILD_OPS=0 $(PIP) install --quiet --progress-bar off -r requirements.txt
	$(PIP) install --quiet --no-deps --no-build-isolation --editable .
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed requirements-dev.txt
	$(PIP) install --quiet --progress-bar off -r requirements-dev.txt
# The tests interpret Triton's kernels. A GPU machine has the version that its torch needs: no pin may replace it.
	@$(BIN)/python -c 'import triton' 2>/dev/null || $(PIP) install --quiet --progress-bar off 'triton==3.9.0; platform_system == "Linux"'
	@touch $@

install: $(VENV)/.installed ## Make .venv and install the pinned packages (once).

demo: $(VENV)/.installed ## Corpus to solved puzzles: preprocess, train with PUMA on two ranks, interrupt, resume, evaluate.
	$(BIN)/python tools/demo.py

# Files in order: the fixtures of a file are made once, and the long files do not come last.
test: $(VENV)/.installed-dev ## Run the tests.
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

test-fast: $(VENV)/.installed-dev ## Run the tests that start no processes: about a minute.
	$(BIN)/python -m pytest -n 2 -m "not slow and not distributed and not slurm"

# SLURM_INSTALL=1 lets root install what is missing.
test-slurm: $(VENV)/.installed-dev ## Run the job chain on a real two-node SLURM, started on this machine.
	@{ command -v slurmctld && command -v munged; } >/dev/null || { [ "$(SLURM_INSTALL)" = 1 ] && apt-get update -qq && \
	    DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends slurm-wlm munge >/dev/null; } || \
	    { echo "SLURM is missing: apt-get install slurm-wlm munge, or, as root, make test-slurm SLURM_INSTALL=1"; exit 2; }
	$(BIN)/python -m pytest -m slurm tests/slurm

gpu-proof: $(VENV)/.installed-dev ## Measure this machine's GPU in a quarter of an hour: rates, numerics, MFU, memory, resume; writes runs/gpu_proof.
	$(BIN)/python -m benchmarks.gpu_proof

lint: $(VENV)/.installed-dev ## Check style (ruff), types (mypy), imports (import-linter), shell scripts (shellcheck), Dockerfile (hadolint).
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache
	$(BIN)/shellcheck -x slurm/*.sbatch slurm/*.sh slurm/site.env.example tools/completion.bash .ci/run deploy/install.sh benchmarks/gpu_proof/offline.sh
	$(BIN)/hadolint deploy/Dockerfile

format: $(VENV)/.installed-dev ## Rewrite the code in the project's style.
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

reference: $(VENV)/.installed ## Write docs/reference/settings.md from the settings' docstrings.
	$(BIN)/python -m pipeline.config.reference > docs/reference/.settings.md
	@mv docs/reference/.settings.md docs/reference/settings.md

clean: ## Remove .venv and caches; runs/ is kept.
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis
