# `make` lists the targets. Everything runs in $(VENV), which `make setup` makes.

VENV ?= .venv
PYTHON ?= python3.11
CONSTRAINTS ?= scripts/constraints.txt
PYTEST_ARGS ?=
MINUTES ?= 30
REQUESTS ?= 5000
WORKERS ?= 2
VERSION ?= 0.33.0
STAGES ?=

RUN := $(VENV)/bin/python -m

# Nothing here needs a hub, or tells vLLM's usage statistics that it ran.
export HF_HUB_OFFLINE ?= 1
export VLLM_NO_USAGE_STATS ?= 1

.DEFAULT_GOAL := help
.PHONY: help setup test test-slow test-long test-next xformers-test gpu-test gpu-bench cluster-test soak fuzz demo demo-ui demo-image report docs lint format constraints clean

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  \1\t\2/p' $(MAKEFILE_LIST) | expand -t 16

setup: ## make .venv with vLLM's CPU build and this project in it; at once when it is there
	@VENV=$(VENV) PYTHON=$(PYTHON) CONSTRAINTS=$(CONSTRAINTS) bash scripts/setup.sh

test: lint ## lint, then the quick tests, on WORKERS processes
	$(RUN) pytest -n $(WORKERS) --dist loadfile -m "not slow and not long and not cluster" $(PYTEST_ARGS)

test-slow: setup ## the tests that `make test` leaves out and CI does not
	$(RUN) pytest -n $(WORKERS) --dist loadfile -m "slow and not long and not cluster" $(PYTEST_ARGS)

test-long: setup ## the tests that take minutes each, which CI leaves out too
	$(RUN) pytest -m long $(PYTEST_ARGS)

test-next: setup ## the engine's tests over the Python files of vLLM VERSION
	bash scripts/next_vllm.sh $(VERSION) $(VENV) out/vllm-$(VERSION)
	PYTHONPATH=$(CURDIR)/out/vllm-$(VERSION):$(CURDIR) $(RUN) pytest tests/test_private_names.py tests/patches tests/engine \
		tests/test_simulated_card.py \
		$(PYTEST_ARGS)

xformers-test: setup ## the attention backend on xformers, in Triton's interpreter where there is no GPU
	bash scripts/xformers.sh $(VENV) out/xformers
	PYTHONPATH=$(CURDIR)/out/xformers:$(CURDIR) $(RUN) pytest tests/attention/test_xformers_backend.py \
		tests/attention/test_xformers_ahead_of_time.py tests/engine/test_xformers.py $(PYTEST_ARGS)

gpu-test: ## kernels, engines, graphs and ranks on a card: VENV=.venv-cuda make gpu-test (docs/recipe-gpu.md)
	PYTHON=$(VENV)/bin/python bash scripts/gpu/test.sh $(STAGES)

gpu-bench: ## passes by kind, and tokens/s of recorded runs, on a card: VENV=.venv-cuda make gpu-bench
	PYTHON=$(VENV)/bin/python bash scripts/gpu/bench.sh

cluster-test: setup ## two Ray nodes, two engines, two replicas, and what happens when one dies
	$(RUN) pytest -m cluster tests/cluster $(PYTEST_ARGS)

soak: setup ## a server at full load for MINUTES: answers, memory, KV blocks (docs/reliability.md)
	$(RUN) tests.reliability soak --minutes $(MINUTES)

fuzz: setup ## REQUESTS malformed requests to a server that answers good ones meanwhile
	$(RUN) tests.reliability fuzz --requests $(REQUESTS)

demo: setup ## serve the tiny model and stream three answers
	$(VENV)/bin/python examples/demo.py

demo-ui: setup ## serve the tiny model, and a page that shows its answers appear
	$(VENV)/bin/python examples/demo_ui.py

demo-image: setup ## serve a tiny model that sees, and ask it about three pictures
	$(VENV)/bin/python examples/demo_image.py

report: setup ## out/report.html: the demo's problems under four settings, replayed pass by pass
	$(VENV)/bin/python examples/report.py --out out/report.html

docs: setup ## the documentation site, into out/docs/site
	bash scripts/docs.sh $(VENV)/bin/python

lint: setup ## ruff, mypy, and which package may import which
	$(RUN) ruff check .
	$(RUN) ruff format --check .
	$(RUN) mypy
	$(VENV)/bin/lint-imports --no-logo --no-cache

format: setup ## sort imports, mend what ruff can mend, format
	$(RUN) ruff check --fix .
	$(RUN) ruff format .

constraints: setup ## write what .venv holds to scripts/constraints.txt
	$(VENV)/bin/pip freeze --exclude-editable --exclude vllm > $(VENV)/frozen.txt
	{ grep '^#' scripts/constraints.txt; cat $(VENV)/frozen.txt; } > $(VENV)/constraints.txt
	mv $(VENV)/constraints.txt scripts/constraints.txt

clean: ## remove .venv and all caches
	rm -rf $(VENV) .pytest_cache .hypothesis .import_linter_cache .mypy_cache .ruff_cache build dist
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
