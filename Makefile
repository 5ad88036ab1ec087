# every target works as the first command on a fresh clone
PYTHON ?= python3
BIN = .venv/bin
.PHONY: setup demo test test-slow test-gpu test-matrix check bench docs

setup: .venv/done

.venv/done: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv && $(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -c constraints.txt torch && $(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	touch $@

demo: setup
	$(BIN)/parakeet demo

test: setup
	$(BIN)/python -m pytest -m "not slow and not gpu"

test-slow: setup
	$(BIN)/python -m pytest -m "slow and not gpu"

test-gpu: setup
	$(BIN)/python -m pytest -m gpu

# every supported Python and transformers release, each in an environment of its own: some 10 GB of downloads
test-matrix:
	$(PYTHON) tests/matrix.py

check: setup
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy

bench: setup
	$(BIN)/python benchmarks/encoder.py && $(BIN)/python benchmarks/decoding.py && $(BIN)/python benchmarks/loss.py

docs: setup
	$(BIN)/python -m pytest tests/test_docs.py
