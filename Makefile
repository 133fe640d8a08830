# The one door: make demo | test | lint. Everything goes into .venv; all of it is safe to repeat, and quick the second time.
#   make PYTHON=python3.12 demo     another Python (3.11 or later)
#   make test ARGS="tests/samplers -x"

PYTHON ?= python3
ARGS ?=
BIN := .venv/bin
PACKAGES := samplers metrics distill app configs

.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help demo test lint links

help:
	@echo "make demo   install, distil the embedded teacher in some minutes, print the table and where the picture is"
	@echo "make test   install with the test extra, run the tests"
	@echo "make lint   install with the dev extra, run ruff check, ruff format --check and pyright"

demo: .venv/installed
	$(BIN)/fewstep train quickstart --resume

# a file's fixtures, some of them trainings in processes of their own, are made once: its tests stay on one worker
test: .venv/installed-test
	$(BIN)/pytest -n 2 --dist loadfile --no-loadscope-reorder $(ARGS)

lint: .venv/installed-dev links
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

# pyright reads sources without running the import hooks of the editable install: it finds fewstep.NAME here
links:
	@mkdir -p build/links/fewstep
	@for name in $(PACKAGES); do ln -sfn ../../../$$name build/links/fewstep/$$name; done

# Each stamp is written last, so what was interrupted is done again.
.venv/created:
	@$(PYTHON) -c 'import sys; sys.exit(None if sys.version_info >= (3, 11) else "fewstep needs Python 3.11 or later, and $(PYTHON) is " + sys.version.split()[0] + "; try: make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv .venv
	@touch $@

.venv/installed: EXTRA :=
.venv/installed-test: EXTRA := [test]
.venv/installed-dev: EXTRA := [dev]
.venv/installed .venv/installed-test .venv/installed-dev: .venv/created pyproject.toml constraints.txt
	$(BIN)/python -m pip install -c constraints.txt -e '.$(EXTRA)'
	@touch $@
