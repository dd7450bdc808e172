# The project's commands.  On a fresh machine: make demo, then make test.  They need Python 3.11 or later, with pip.

PYTHON ?= python3
BENCH ?=
SECONDS_EACH ?= 3600
SEED ?= 0
ARGS ?=
VENV := .venv
BIN := $(VENV)/bin
PYTEST := -m pytest --numprocesses auto --maxprocesses 8 --dist worksteal --durations 15
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check

.PHONY: help demo test quick check coverage fuzz bench clean distclean

help: ## list these commands
	@sed -n 's/^\([a-z]*\):.*## /  make \1	/p' Makefile | expand -t 20

demo: $(VENV)/.demo ## install the package, then show the main job on a small file
	@$(BIN)/python fixtures/demo.py demo

test: $(VENV)/.test real/.complete ## install what the tests need, fetch real checkpoints, run the whole suite
	$(BIN)/python $(PYTEST) $(ARGS)

quick: $(VENV)/.test ## the part of the suite that takes a minute; ARGS="tests/edits" for a part of that
	$(BIN)/python $(PYTEST) -m "not slow" $(ARGS)

check: $(VENV)/.check real/.complete ## the gate: format, lint, types, the whole suite
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python $(PYTEST)

coverage: $(VENV)/.check real/.complete ## run the whole suite and list the lines that no test reaches
	$(BIN)/python -m coverage erase
	$(BIN)/python -m coverage run $(PYTEST)
	$(BIN)/python -m coverage combine --quiet
	$(BIN)/python -m coverage report --skip-covered --show-missing

fuzz: $(VENV)/.test ## search for files that two readers read in two ways; SECONDS_EACH=3600 SEED=0
	CKPT_FUZZ_SECONDS=$(SECONDS_EACH) CKPT_FUZZ_SEED=$(SEED) $(BIN)/python -m pytest -n 0 tests/formats/test_differential.py
	CKPT_FUZZ_EXAMPLES=20000 $(BIN)/python -m pytest tests/formats/test_fuzz.py

bench: $(VENV)/.test ## measure time and memory against cp; BENCH="--gib 1" for a smaller file
	$(BIN)/python tests/bench.py $(BENCH)

clean: ## remove the demo's folder and all caches
	rm -rf demo build dist *.egg-info .coverage .coverage.* .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find ckpt_surgeon tests fixtures -name __pycache__ -prune -exec rm -rf {} +

distclean: clean ## remove the virtual environment and the real checkpoints too
	rm -rf $(VENV) real

# -- stamps: a target is made again when pyproject.toml has changed

$(VENV)/.made:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "$(PYTHON) is older than Python 3.11; name a newer one: make PYTHON=python3.12 …" >&2; exit 1; }
	@echo "making the virtual environment $(VENV)"
	@$(PYTHON) -m venv $(VENV) 2>$(VENV).log \
		|| { $(PYTHON) -m venv --clear --without-pip $(VENV) && $(PYTHON) -m pip --python $(VENV)/bin/python install pip; } \
		|| { cat $(VENV).log >&2; exit 1; }
	@rm -f $(VENV).log
	@touch $@

$(VENV)/.demo: pyproject.toml $(VENV)/.made
	@echo "installing the package (PyTorch is large: this may take minutes)"
	@$(INSTALL) --editable .
	@touch $@

$(VENV)/.test: pyproject.toml $(VENV)/.made
	@echo "installing the package and what its tests need (PyTorch is large: this may take minutes)"
	@$(INSTALL) --editable '.[test,real]'
	@touch $@ $(VENV)/.demo

$(VENV)/.check: pyproject.toml $(VENV)/.made
	@echo "installing the package, what its tests need, and the linters (PyTorch is large: this may take minutes)"
	@$(INSTALL) --editable '.[dev,real]'
	@touch $@ $(VENV)/.demo $(VENV)/.test

real/.complete: fixtures/fetch_real.py $(VENV)/.made
	$(BIN)/python fixtures/fetch_real.py --out real
	@touch $@
