# `make demo` shows what genrec does, `make test` checks that it works. Everything is installed into
# a virtual environment of this folder, from constraints.txt; stamp files keep that from repeating.

PYTHON ?= python3
VENV ?= .venv
# What pip is asked for before anything else; any requirement and options of `pip install`.
TORCH ?= $(shell grep -m1 '^torch==' constraints.txt)
# More arguments for the command behind a target, e.g. make test ARGS="-k beam".
ARGS ?=
# Any value but 0 makes `demo` and `bench` short.
QUICK ?= 0

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
PINS := $(VENV)/constraints.txt
TORCH_STAMP := $(VENV)/.torch-$(shell printf '%s' '$(TORCH)' | cksum | cut -d ' ' -f 1)
QUICK_FLAG := $(if $(filter-out 0,$(QUICK)),--quick)
BENCHMARKS ?= $(filter-out common loops quality%,$(basename $(notdir $(wildcard benchmarks/[a-z]*.py))))

.DEFAULT_GOAL := help
.PHONY: help demo test check install bench wheel clean

help: ## list the targets
	@echo "make demo is the first thing to try. Variables: PYTHON, VENV, TORCH, QUICK, ARGS."
	@sed -n 's/^\([a-z]*\):.*## \(.*\)/  make \1\t\2/p' Makefile

demo: $(VENV)/.installed ## train on MovieLens-100K, compare with baselines, recommend (QUICK=1: shorter)
	$(BIN)/genrec demo $(QUICK_FLAG) $(ARGS)

test: $(VENV)/.installed-dev ## run the test suite
	@$(BIN)/genrec assets fetch || echo "Going on without it: tests on MovieLens-100K will be skipped."
	$(BIN)/python -m pytest -n auto --dist loadfile $(ARGS)

check: $(VENV)/.installed-dev ## lint, formatting, types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

install: $(VENV)/.installed-dev ## only set up the virtual environment, with the developers' tools

bench: $(VENV)/.installed-dev ## run the benchmarks (QUICK=1: small sizes) and write runs/benchmarks/*.json
	@set -e; for name in $(BENCHMARKS); do \
		echo "benchmarks.$$name"; \
		$(BIN)/python -m benchmarks.$$name $(QUICK_FLAG) --json runs/benchmarks/$$name.json $(ARGS); \
	done

wheel: $(VENV)/.installed-dev ## build dist/genrec-*.whl
	$(BIN)/python -m build --wheel --no-isolation $(ARGS)

clean: ## remove caches and build leftovers (keeps the virtual environment, assets and runs)
	rm -rf build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +

# -- the virtual environment ---------------------------------------------------------------------

# torch first and alone: what was installed is then pinned for everything that comes after.
$(TORCH_STAMP): constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info; v >= (3, 11) or sys.exit(f"Python {v[0]}.{v[1]} is too old, expected 3.11 or newer. Name another one: make PYTHON=python3.12 ...")'
	@$(BIN)/python -m pip --version > /dev/null 2>&1 || $(PYTHON) -m venv $(VENV)
	@if ls $(VENV)/.torch-* > /dev/null 2>&1; then $(PIP) uninstall --yes torch; fi
	@grep -v '^torch==' constraints.txt > $(PINS)
	$(PIP) install --constraint $(PINS) $(TORCH)
	@$(BIN)/python -c 'from importlib.metadata import version; print("torch==" + version("torch"))' >> $(PINS)
	@rm -f $(VENV)/.torch-*
	@touch $@

$(VENV)/.installed: pyproject.toml $(TORCH_STAMP)
	$(PIP) install --constraint $(PINS) --editable '.[text,plots]'
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(PIP) install --constraint $(PINS) --editable '.[text,plots,dev]'
	@touch $@
