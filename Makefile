# make demo | test | lint | clean | help.  Variables: PYTHON, VENV, TORCH, TORCH_INDEX (see `make help`).
PYTHON ?= python3
VENV ?= .venv
TORCH ?= auto
TORCH_INDEX ?=
DEMO_OUTPUT ?=

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --disable-pip-version-check
TORCH_VERSION := $(shell sed -n 's/^torch==//p' constraints.txt)
# A build with CUDA only where a GPU answers; elsewhere it would bring some twenty packages and gigabytes for nothing.
HAS_GPU := $(shell command -v nvidia-smi >/dev/null 2>&1 && nvidia-smi -L >/dev/null 2>&1 && echo yes)
LINUX := $(shell test "$$(uname -s)" = Linux && echo yes)
# The exact torch that is installed: given to every later pip call, so that no dependency can replace it.
TORCH_PIN := $(VENV)/torch.txt

.PHONY: demo test lint clean help
.DEFAULT_GOAL := help

demo: $(VENV)/.core
	$(BIN)/bitbrush demo $(if $(DEMO_OUTPUT),--output $(DEMO_OUTPUT))

test: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/mypy

clean:
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find src tests -name __pycache__ -type d -prune -exec rm -rf {} +

help:
	@echo "make demo    install, quantize the bundled model, compare, write report.html"
	@echo "make test    install, then ruff, mypy and the tests"
	@echo "make lint    ruff and mypy only"
	@echo "make clean   remove the environment and the caches"
	@echo
	@echo "PYTHON=python3.12   the interpreter to make the environment with (3.11 or newer)"
	@echo "VENV=.venv          where the environment lies"
	@echo "TORCH_INDEX=...     a package index to take torch from: PyTorch's CPU wheel index, see pytorch.org/get-started"
	@echo "TORCH=any           take whichever build of torch pip finds first (may be CUDA: gigabytes)"
	@echo "DEMO_OUTPUT=DIR     where the demo writes"

$(VENV)/.python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "what:  this Python is too old for bitbrush" >&2; \
		echo "where: PYTHON=$(PYTHON), $$($(PYTHON) --version 2>&1)" >&2; \
		echo "why:   bitbrush needs Python 3.11 or newer" >&2; \
		echo "try:   make demo PYTHON=python3.12" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	@touch $@

$(VENV)/.torch: $(VENV)/.python constraints.txt
	@rm -f $(TORCH_PIN)
ifneq ($(TORCH_INDEX),)
	$(PIP) --index-url "$(TORCH_INDEX)" "torch==$(TORCH_VERSION)"
else ifeq ($(TORCH),any)
	$(PIP) "torch==$(TORCH_VERSION)"
else ifeq ($(LINUX)$(HAS_GPU),yes)
	@echo "No NVIDIA GPU here: installing the CPU build of torch $(TORCH_VERSION)."
	@$(PIP) "torch==$(TORCH_VERSION)+cpu" || { \
		echo >&2; \
		echo "what:  pip found no CPU build of torch $(TORCH_VERSION)" >&2; \
		echo "where: installing torch==$(TORCH_VERSION)+cpu into $(VENV)" >&2; \
		echo "why:   this machine has no NVIDIA GPU, and the ordinary wheel would bring gigabytes of CUDA packages; the CPU wheels lie on an index of their own" >&2; \
		echo "try:   make demo TORCH_INDEX=<PyTorch's CPU wheel index, see pytorch.org/get-started>   or, to take any build: make demo TORCH=any" >&2; \
		exit 1; }
else
	$(PIP) "torch==$(TORCH_VERSION)"
endif
	@$(BIN)/python -c 'import importlib.metadata as m; print("torch==" + m.version("torch"))' > $(TORCH_PIN)
	@touch $@

$(VENV)/.core: $(VENV)/.torch pyproject.toml constraints.txt
	$(PIP) -c constraints.txt -c $(TORCH_PIN) -e .
	@touch $@

$(VENV)/.dev: $(VENV)/.core
	$(PIP) -c constraints.txt -c $(TORCH_PIN) -e '.[dev]'
	@# Alone: its torchvision would be a CUDA build, which cannot be imported beside a CPU build of torch (docs/decisions.md).
	$(PIP) -c constraints.txt --no-deps torch-fidelity
	@touch $@
