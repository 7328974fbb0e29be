# A fresh machine needs Python 3.10-3.13, git and make. See README.md.
#
#   PYTHON        the Python that makes .venv                        (default: python3)
#   TORCH         the torch requirement to install into .venv        (default: the tested version, from your package index)
#   CONSTRAINTS   a pip constraints file for the trainer's libraries (default: constraints.txt, the tested versions;
#                 constraints-oldest.txt holds the oldest supported versions, /dev/null gives the newest)
#   COMFYUI_PATH  the folder of your ComfyUI                         (default: ComfyUI is fetched into .runtime)

PYTHON ?= python3
TORCH ?= torch==2.13.0
CONSTRAINTS ?= constraints.txt
VENV := .venv
PY := $(VENV)/bin/python
# Threads of two busy torch processes slow each other down, so a test process uses one.
TEST_THREADS ?= 1
# Processes that share the test files; each may start a ComfyUI (about 2 GB).
TEST_PROCESSES ?= 2
PYTEST = OMP_NUM_THREADS=$(TEST_THREADS) $(PY) -m pytest --numprocesses $(TEST_PROCESSES) --dist loadfile --no-loadscope-reorder

.DEFAULT_GOAL := help
.PHONY: help install runtime demo test coverage comfy lint check-registry format clean

help:  ## print this help
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16

$(VENV)/.installed: pyproject.toml $(filter-out /dev/null,$(CONSTRAINTS))
	$(PYTHON) -c 'import sys; ok = (3, 10) <= sys.version_info[:2] < (3, 14); sys.exit(0 if ok else "Python 3.10-3.13 is needed, but $(PYTHON) is " + sys.version.split()[0] + ". Name another one: make PYTHON=python3.12 ...")'
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --disable-pip-version-check --constraint $(CONSTRAINTS) "$(TORCH)"
	$(PY) -m pip install --quiet --disable-pip-version-check --constraint $(CONSTRAINTS) \
		--editable ".[trainer,dev]"
	touch $@

install: $(VENV)/.installed  ## make .venv with the trainer and the development tools

runtime: install  ## fetch the ComfyUI that demo, comfy and test use (not if COMFYUI_PATH is set)
	$(PY) scripts/comfy_runtime.py fetch

demo: runtime  ## distil the demo, compare it with its teacher, run it in ComfyUI; results in out/demo
	$(PY) scripts/demo.py

comfy: runtime  ## start ComfyUI with this extension and the demo, print its address
	$(PY) scripts/comfy_runtime.py start $(if $(wildcard out/demo/lora.safetensors),--lora out/demo/lora.safetensors)

test: runtime  ## run all tests, also in the real ComfyUI and (with Chromium) in its page
	$(PYTEST)

coverage: runtime  ## run all tests, print which lines they do not reach; HTML in out/coverage
	mkdir -p out/coverage
	$(PYTEST) --cov --cov-report=term-missing --cov-report=html:out/coverage/html \
		--cov-report=xml:out/coverage/coverage.xml --cov-report=markdown:out/coverage/table.md

lint: install  ## check format, code and types
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ruff check .
	mkdir -p .mypy && ln -sfn .. .mypy/flash_diffusion  # the package's name, whatever this folder is called
	$(VENV)/bin/mypy

check-registry: runtime  ## check the package for the Comfy registry, with the registry's and others' tools
	$(PY) scripts/check_registry.py

format: install  ## format the code
	$(VENV)/bin/ruff format .
	$(VENV)/bin/ruff check --fix .

clean:  ## remove all build products and results (.venv and .runtime stay)
	rm -rf out build dist *.egg-info .pytest_cache .ruff_cache .mypy .mypy_cache .hypothesis .coverage .coverage.*
