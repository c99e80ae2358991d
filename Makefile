# Everything runs in .venv, which is made here: a machine needs Python 3.11 or newer and make.
#   make demo     install, then run the main job: 50 trials on digits
#   make test     install, get what tests need from outside Python, run the tests
#   make check    ruff, mypy, import-linter
#   make bench    the figures under benchmarks/
#   make chaos    the product's commands under every fault, an hour or more
# Another Python: make PYTHON=python3.12 demo

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
# A file of tests on each core, with one thread: more busy threads than cores are slower. The files
# in their order, for the long ones (tests/acceptance) come first.
PYTEST_OPTIONS ?= --numprocesses auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder
DEBIAN_PACKAGES := chromium dataset-fashion-mnist

.DELETE_ON_ERROR:
.PHONY: demo test check bench chaos install debian-packages clean

demo: $(VENV)/installed
	$(BIN)/hpo launch --trials 50

test: $(VENV)/installed-test debian-packages
	PATH="$(CURDIR)/$(BIN):$$PATH" OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(PYTEST_OPTIONS)

check: $(VENV)/installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: $(VENV)/installed debian-packages
	$(BIN)/python -m benchmarks

chaos: $(VENV)/installed-test
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -m benchmarks.chaos --long --out benchmarks/chaos.md

install: $(VENV)/installed

debian-packages:
	@sh .ci/debian-packages $(DEBIAN_PACKAGES)

clean:
	rm -rf $(VENV)

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "hpo needs Python 3.11 or newer; name one: make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; exit 2; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || sh .ci/debian-packages python3-venv
	$(PYTHON) -m venv $(VENV)

$(VENV)/installed: pyproject.toml constraints.txt | $(BIN)/python
	@echo "installing into $(VENV): a few minutes the first time"
	$(INSTALL) -e .
	@touch $@

$(VENV)/installed-test: $(VENV)/installed
	$(INSTALL) -e '.[test]'
	@touch $@
