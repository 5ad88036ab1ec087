# every target works as the first command on a fresh clone
PYTHON ?= python3
BIN = .venv/bin
.PHONY: setup demo test test-slow test-gpu test-matrix wheel-test check docs bench bench-quick kernel

setup: .venv/done

.venv/done: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv && $(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -c constraints.txt torch && $(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	touch $@

demo: setup
	$(BIN)/parakeet demo

test: setup
	$(BIN)/python -m pytest -n auto -m "not slow and not gpu"

test-slow: setup
	$(BIN)/python -m pytest -m "slow and not gpu"

test-gpu: setup
	$(BIN)/python -m pytest -m gpu

# every supported Python and transformers release, each in an environment of its own: about 10 GB of downloads
test-matrix:
	$(PYTHON) tests/matrix.py

# an sdist, a wheel built from it, and tests of the wheel in an empty environment
wheel-test: setup
	$(BIN)/python tests/wheel.py

check: setup docs
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy

# the pages of docs/ as a site in build/docs; a dead link is an error (not with --quiet, which hides warnings from --strict)
docs: setup
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

bench: setup
	$(BIN)/python benchmarks/encoder.py && $(BIN)/python benchmarks/decoding.py && $(BIN)/python benchmarks/loss.py

# from samples to text, this package and stock transformers: about 3 minutes
bench-quick: setup
	$(BIN)/python benchmarks/end_to_end.py --quick

# the kernel as the library `kernels` loads it: dist/transducer-loss/build/torch-cpu and torch-cuda
kernel: setup
	$(BIN)/python hub_kernels/transducer-loss/build_layout.py dist/transducer-loss
