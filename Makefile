# make demo    compare four policies on the model that ships, print the table, write report.html
# make test    lint, types, tests (CPU only, offline once installed)
# make slow    the long tests; their figures go into docs/reliability.md
# make gpu     kernels tested and measured on this machine's GPU, results into benchmarks/results/
# make sanitize   the kernels that score, search and store, under compute-sanitizer on this machine's GPU

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
FIGURES := $(VENV)/reliability.jsonl

.PHONY: demo test lint types unit slow able gpu sanitize clean

demo: $(VENV)/.demo
	$(BIN)/kvsieve compare configs/quickstart.yaml

test: lint types unit

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.installed
	$(BIN)/mypy

unit: $(VENV)/.installed
	$(BIN)/python -m pytest -m "not gpu and not slow" -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder

# The figures that slow tests record, docs/reliability.md shows.
slow: $(VENV)/.installed
	@: > $(FIGURES)
	KVSIEVE_RELIABILITY=$(abspath $(FIGURES)) $(BIN)/python -m pytest -m "slow or figures"
	$(BIN)/python -m tests.reliability $(FIGURES) > benchmarks/results/reliability.md
	$(BIN)/python -m tests.test_docs

# Runs with the interpreter at hand: a CUDA image brings its own torch and triton.
gpu sanitize able: export PYTHONPATH := framework:policies

# Compiling takes the tests' time: with pytest-xdist, on eight cores.
SIDE_BY_SIDE = $(shell $(PYTHON) -c 'import xdist' 2>/dev/null && echo '-n auto --maxprocesses 8')

gpu: able
	$(PYTHON) -m pytest -m "not slow" $(SIDE_BY_SIDE) tests/kernels
	$(PYTHON) -m pytest -m gpu tests/test_graph.py
	$(PYTHON) -m kvsieve.cli bench attention --out benchmarks/results
	$(PYTHON) -m kvsieve.cli bench growth --out benchmarks/results
	$(PYTHON) -m kvsieve.cli bench decode --out benchmarks/results

# Without torch's own pool of memory, so that every tensor has bounds of its own.
sanitize: able
	for tool in memcheck racecheck initcheck; do PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool $$tool \
	    --error-exitcode 1 $(PYTHON) -m pytest $(addprefix tests/kernels/test_,$(SANITIZED)) || exit 1; done

SANITIZED = token.py lowest.py scores.py select.py

NEEDED = torch triton transformers safetensors pluggy yaml pydantic typer rich filelock psutil pytest

able:
	@$(PYTHON) -c 'import sys; from importlib.util import find_spec; \
	    lacks = [name for name in sys.argv[1:] if not find_spec(name)]; \
	    sys.exit(f"{sys.executable} lacks {lacks}; without network: pip install --no-deps WHEELS" if lacks else 0)' $(NEEDED)

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
