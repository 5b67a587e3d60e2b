# Everything from nothing: `make demo` runs the main job on embedded data, `make test` passes all tests.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
RSCLI := $(BIN)/rscli
DEMO := demo

.PHONY: demo test fast lint types check docs clean
.DELETE_ON_ERROR:

$(VENV)/.run: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e .
	touch $@

$(VENV)/.dev: pyproject.toml $(VENV)/.run
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[dev]'
	touch $@

$(VENV)/.docs: pyproject.toml $(VENV)/.run
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[docs]'
	touch $@

# train two models, certify both, compare them, predict: about two minutes on two slow CPU cores. With so few Monte Carlo
# samples radii end at 0.62 for sigma 0.25, and the order of the two is the same as with more.
demo: $(VENV)/.run
	rm -rf $(DEMO)
	$(RSCLI) train --preset digits-gaussian-0.25 --out $(DEMO)/gaussian
	$(RSCLI) train --preset digits-cons-0.25 --out $(DEMO)/consistency
	$(RSCLI) certify $(DEMO)/gaussian/model.safetensors --n 1000 --max 100
	$(RSCLI) certify $(DEMO)/consistency/model.safetensors --n 1000 --max 100
	$(RSCLI) compare $(DEMO)/gaussian $(DEMO)/consistency --plot $(DEMO)/certified.png
	$(RSCLI) predict $(DEMO)/consistency examples/digits --certify --n 1000
	@echo "The plot is $(DEMO)/certified.png"

test: $(VENV)/.dev
	$(BIN)/pytest -n auto --dist worksteal

# the tests that need no GPU, install nothing and take no more than a few seconds each
fast: $(VENV)/.dev
	$(BIN)/pytest -n auto --dist worksteal -m "not slow and not install and not gpu"

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.dev
	$(BIN)/mypy -p rscli -p rscli_core -p rscli_smoothmix -p rscli_catrs && $(BIN)/mypy bench/*.py

check: lint types docs test

# the documentation as a site, in site/
docs: $(VENV)/.docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

clean:
	rm -rf $(VENV) $(DEMO) site build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
