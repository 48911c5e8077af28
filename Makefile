PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test lint bench mutants constraints

demo: .venv/.installed  ## train on digits, draw a grid, measure it
	$(BIN)/python train.py configs/digits.py $(TRAIN_ARGS)
	$(BIN)/python sample.py --checkpoint runs/digits --output grid.png
	$(BIN)/python evaluate.py --checkpoint runs/digits $(EVALUATE_ARGS)
	@echo "look at grid.png"

test: .venv/.installed  ## on all processors, the tests of a file on one
	$(BIN)/python -m pytest --numprocesses auto --maxprocesses 4 --dist loadfile

lint: .venv/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

mutants: .venv/.installed  ## change the mathematics a little, and count the changes that the tests notice
	$(BIN)/python tests/mutants.py

bench: .venv/.installed  ## what the loader reaches; the paper's recipe and ours on digits
	$(BIN)/python benchmarks/loader.py
	$(BIN)/python benchmarks/digits.py

# uv resolves and installs in seconds what takes pip minutes.
.venv/.installed: setup.cfg constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet uv
	$(BIN)/uv pip install --quiet --python $(BIN)/python --constraints constraints.txt --editable '.[dev]'
	touch $@

constraints: .venv/.installed  ## pin the newest set that resolves, for every platform
	$(BIN)/uv pip compile --quiet --universal --python-version 3.10 --extra dev --no-header --no-annotate \
		--upgrade setup.cfg --output-file constraints.txt
