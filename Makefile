PYTHON ?= python3
VENV := .venv
STAMP := $(VENV)/.installed
# Installed without their dependencies: BackPACK names torchvision, which is not needed here and must match torch.
PEERS := backpack-for-pytorch curvlinops-for-pytorch einconv einops jaxtyping linear_operator opt-einsum unfoldNd \
	wadler-lindig
BENCH ?=

.PHONY: help install demo test lint docs bench clean

help: ## Show the targets
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/'

install: $(STAMP) ## Create .venv and install the package with pinned versions

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --upgrade pip -c constraints.txt
	$(VENV)/bin/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	touch $(STAMP)

demo: install ## Two deletion requests beside a training (a minute), then a report of digits forgotten (about a minute)
	$(VENV)/bin/fisher-forget demo
	$(VENV)/bin/fisher-forget run configs/digits.yaml

test: install ## Run the whole test suite in two processes
	$(VENV)/bin/python -m pytest -n 2 --dist worksteal

lint: install ## Formatting, lint, types and import contracts
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(VENV)/bin/lint-imports

docs: install ## Build the documentation into site/; open site/index.html
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/mkdocs build --strict --quiet

bench: install ## Time, memory and error beside BackPACK and curvlinops; BENCH="--quick --only mlp" for less
	$(VENV)/bin/python -m pip install --quiet -c constraints.txt --no-deps $(PEERS)
	$(VENV)/bin/python -m benchmarks.bench $(BENCH)

clean: ## Remove the environment and all results
	rm -rf $(VENV) runs site build dist *.egg-info
