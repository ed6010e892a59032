# `make demo` and `make test` do all set-up themselves, in .venv.
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed

.PHONY: demo test lint docs clean

demo: $(STAMP)
	$(BIN)/taylor-patch demo

test: $(STAMP) lint
	$(BIN)/python -m pytest

lint: $(STAMP)
	$(BIN)/ruff check taylor_patch tests benchmarks plugins tools
	$(BIN)/mypy

docs: $(STAMP)
	$(BIN)/python -m tools.reference_pages
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[demo,dev,docs]"
	touch $(STAMP)

clean:
	rm -rf .venv dist site taylor-demo
