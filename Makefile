# Everything lives in .venv. `make demo` installs just the package; the other targets add what they need.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet -c constraints.txt
DEMO := runs/demo

# What tests compare with. Without dependencies: torchvision has no CPU build that pip would find by itself.
ORACLES := torchvision==0.28.0 timm==1.0.31 huggingface_hub

.PHONY: venv demo test lint bench docs clean

venv: $(VENV)/.dev

$(VENV)/.package: pyproject.toml constraints.txt
	@$(PYTHON) -c "import sys; sys.version_info >= (3, 11) or sys.exit('Python 3.11 or later is needed: make PYTHON=python3.12')"
	@echo "installing omniconv and what it needs into $(VENV), once; this takes a minute or two"
	$(PYTHON) -m venv $(VENV)
	$(PIP) --upgrade pip
	$(PIP) --editable ".[export,serve]"
	@touch $@

$(VENV)/.dev: $(VENV)/.package
	$(PIP) --editable ".[all]" --group test --group lint
	$(PIP) --no-deps $(ORACLES)
	@touch $@

$(VENV)/.docs: $(VENV)/.dev
	$(PIP) --group docs
	@touch $@

demo: $(VENV)/.package
	@rm -rf $(DEMO)
	$(BIN)/omniconv fit digits --out $(DEMO)

# Two processes with a thread each: more threads than cores would slow both.
test: $(VENV)/.dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 -m "not slow"

lint: $(VENV)/.dev
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/pyright
	$(BIN)/lint-imports
	$(BIN)/python tools/licences.py

# Without the trainings of fit_small_images.py, which take an hour of a quiet machine, and gpu.py, which needs a GPU.
bench: $(VENV)/.dev
	for script in $(filter-out benchmarks/_% benchmarks/fit_% benchmarks/gpu.py,$(wildcard benchmarks/*.py)); do $(BIN)/python $$script || exit 1; done
	$(BIN)/python benchmarks/_table.py

docs: $(VENV)/.docs
	$(BIN)/sphinx-build -W --keep-going -q -b html docs docs/_build/html
	@echo "docs/_build/html/index.html"

clean:
	rm -rf docs/_build docs/papers docs/networks docs/api docs/benchmarks build dist .pytest_cache .ruff_cache .import_linter_cache .hypothesis
	find omniconv tests -name __pycache__ -type d -prune -exec rm -rf {} +
