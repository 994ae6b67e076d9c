# Two commands: `make quickstart` and `make test`. Everything lives in .venv.
# `make torture` runs tests/torture/ at full length (minutes); `make test` runs it in short. The knob is LUTHIER_TORTURE=full.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: setup setup-test quickstart test torture lint types claims clean

setup: ; @command -v $(PYTHON) >/dev/null || { echo "setup: $(PYTHON) is missing; install Python 3.11 or newer" >&2; exit 2; }
	@$(PYTHON) tools/bootstrap.py run

setup-test: ; @command -v $(PYTHON) >/dev/null || { echo "setup: $(PYTHON) is missing; install Python 3.11 or newer" >&2; exit 2; }
	@$(PYTHON) tools/bootstrap.py test

quickstart: setup
	@$(BIN)/luthier run quickstart

test: setup-test
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile $(TESTS)

torture: setup-test
	@LUTHIER_TORTURE=full OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile tests/torture

lint: setup-test
	@$(BIN)/ruff check src tests benchmarks tools && $(BIN)/ruff format --check -q src tests benchmarks tools

types: setup-test
	@$(BIN)/pyright --pythonpath $(BIN)/python

claims: setup
	@$(BIN)/luthier reproduce --all

clean:
	rm -rf .venv runs build dist
