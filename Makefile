PYTHON ?= python3
VENV := .venv
STAMP := $(VENV)/.installed

.PHONY: help install demo test lint bench clean

help: ## Show the targets
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/'

install: $(STAMP) ## Create .venv and install the package with pinned versions

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --upgrade pip -c constraints.txt
	$(VENV)/bin/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	touch $(STAMP)

demo: install ## Forget handwritten digits and compare with retrained models (two minutes)
	$(VENV)/bin/fisher-forget run configs/digits.yaml

test: install ## Run the whole test suite
	$(VENV)/bin/python -m pytest

lint: install ## Formatting, lint, types and import contracts
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(VENV)/bin/lint-imports

clean: ## Remove the environment and all results
	rm -rf $(VENV) runs build dist *.egg-info
