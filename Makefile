# make demo    compare four policies on the model that ships, print the table, write report.html
# make test    lint, types, tests (CPU only, offline once installed)
# make slow    the long tests; their figures go into docs/reliability.md
# make gpu     kernels tested and measured on this machine's GPU, results into benchmarks/results/

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
FIGURES := $(VENV)/reliability.jsonl

.PHONY: demo test lint types unit slow gpu clean

demo: $(VENV)/.demo
	$(BIN)/kvsieve compare configs/quickstart.yaml

test: lint types unit

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.installed
	$(BIN)/mypy

unit: $(VENV)/.installed
	$(BIN)/python -m pytest -m "not gpu and not slow" -n auto --maxprocesses 4 --dist worksteal

# The figures that slow tests record, docs/reliability.md shows.
slow: $(VENV)/.installed
	@: > $(FIGURES)
	KVSIEVE_RELIABILITY=$(abspath $(FIGURES)) $(BIN)/python -m pytest -m "slow or figures"
	$(BIN)/python -m tests.reliability $(FIGURES) > benchmarks/results/reliability.md
	$(BIN)/python -m tests.test_docs

# Runs with the interpreter at hand: a CUDA image brings its own torch and triton.
gpu:
	PYTHONPATH=framework:policies $(PYTHON) -m pytest -m "not slow" tests/kernels
	PYTHONPATH=framework:policies $(PYTHON) -m pytest -m gpu tests/test_graph.py
	PYTHONPATH=framework:policies $(PYTHON) -m kvsieve.cli bench attention --out benchmarks/results
	PYTHONPATH=framework:policies $(PYTHON) -m kvsieve.cli bench growth --out benchmarks/results
	PYTHONPATH=framework:policies $(PYTHON) -m kvsieve.cli bench decode --out benchmarks/results

PIP = $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

# What the demonstration needs; the tests need a good deal more.
$(VENV)/.demo: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(0 if v >= (3, 11) else f"kvsieve needs Python 3.11 or newer; {sys.executable} is {v[0]}.{v[1]}. Try: make PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV)
	$(PIP) --editable .
	@touch $@

$(VENV)/.installed: $(VENV)/.demo
	$(PIP) --editable '.[dev]'
	@touch $@

clean:
	rm -rf $(VENV) results dist
