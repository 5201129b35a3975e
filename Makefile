# `make demo` and `make test` do all their own set-up: they need Python 3.11 or newer, and nothing else.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
OUT ?= runs/quickstart
SITE ?= $(CURDIR)/site
# One more than there are processors: some tests wait for processes of their own.
WORKERS ?= $(shell $(PYTHON) -c 'import os; print(min(4, 1 + os.cpu_count()))')
PYTEST_ARGS ?= -n $(WORKERS) --dist loadfile --no-loadscope-reorder
# Arguments and results of every function are checked against their annotations, axes of tensors included.
CHECKED := --jaxtyping-packages=endwise,beartype.beartype
BENCH ?= .venv-bench
EXTRAS := dev,docs,gguf,ray,slurm,umap
NEWEST ?= .venv-newest
OLDEST ?= .venv-oldest
BENCH_ARGS ?= --out runs/benchmark.json

# The first also holds for the environment in which pip builds the package, up to pip 25.2; the second does since.
export PIP_CONSTRAINT := constraints.txt
export PIP_BUILD_CONSTRAINT := constraints.txt
export PIP_DISABLE_PIP_VERSION_CHECK := 1
# The tests start many processes, each of which would compile again what it imports.
export PYTHONDONTWRITEBYTECODE :=

.DEFAULT_GOAL := help
.PHONY: help demo test test-all test-newest test-oldest lint lint-all format docs site bench clean

# Modules are compiled when they are first imported; most never are.
PIP_INSTALL := -m pip install --quiet --no-compile
UV_INSTALL := uv pip install --quiet --constraint constraints.txt --build-constraint constraints.txt

# pip brings torch, of which there are many builds, from where it is set up to look; uv brings the rest in a third of
# pip's time. uv reads nothing of pip's set-up, so where it finds no registry, pip brings all.
define install
	$(1)/bin/python $(PIP_INSTALL) --no-deps torch uv
	$(1)/bin/$(UV_INSTALL) --python $(1)/bin/python $(2) || $(1)/bin/python $(PIP_INSTALL) $(2)
endef

# Those with checked shapes run beside the others, in one process, and are shown when all are done. They take one thread:
# several would wait for one another in a loop, on processors that the others need.
define run_tests
	log=$$(mktemp); trap 'rm -f "$$log"' EXIT; \
	OMP_NUM_THREADS=1 $(1)/bin/python -m pytest -m "$(2)" $(CHECKED) tests/shapes > "$$log" 2>&1 & checked=$$!; \
	$(1)/bin/python -m pytest $(PYTEST_ARGS) -m "$(2)" --ignore tests/shapes; plain=$$?; \
	wait $$checked; checked=$$?; cat "$$log"; exit $$((plain ? plain : checked))
endef

help: ## list the commands
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: $(VENV)/.installed ## train four kinds of SAE on the embedded model and compare them
	$(BIN)/endwise quickstart --out "$(OUT)"

test: $(VENV)/.installed-dev ## run the tests, but for the slow ones
	$(call run_tests,$(VENV),not slow)

test-all: $(VENV)/.installed-dev ## run all tests
	$(call run_tests,$(VENV),)

test-newest: $(NEWEST)/.installed ## run all tests with the newest torch, transformers and others
	$(call run_tests,$(NEWEST),)

test-oldest: $(OLDEST)/.installed ## run all tests with the oldest torch and transformers that pyproject.toml allows
	$(call run_tests,$(OLDEST),)

lint: $(VENV)/.installed-dev ## run the static checks
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyrefly check --python-interpreter-path $(BIN)/python
	$(BIN)/lint-imports

# Pyright takes ten times as long, and finds a little more. With `nodejs`, its runtime comes from PyPI as well.
lint-all: lint ## run the static checks, and a slow one
	$(BIN)/python $(PIP_INSTALL) 'pyright[nodejs]'
	$(BIN)/pyright --pythonpath $(BIN)/python

format: $(VENV)/.installed-dev ## put the code into the form that `make lint` asks for
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(VENV)/.installed-dev ## write what docs take from the source: configuration.md, cli.md, the roofline's tables
	$(BIN)/python tools/config_reference.py
	$(BIN)/python tools/cli_reference.py
	$(BIN)/python benchmarks/roofline.py --write

site: $(VENV)/.installed-dev ## write the documentation as a site that opens from the disk
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet --site-dir $(SITE)

bench: $(BENCH)/.installed ## time a training step against the paper's own code (benchmarks/README.md)
	$(BENCH)/bin/python benchmarks/versus_reference.py $(BENCH_ARGS)

clean: ## remove the environments, builds and caches; runs stay
	rm -rf $(VENV) $(BENCH) $(NEWEST) $(OLDEST) dist site .pytest_cache .ruff_cache .hypothesis .import_linter_cache
	find src tests tools benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "endwise needs Python 3.11 or newer. Name one: make PYTHON=python3.12 ..." >&2; exit 1; }
	$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); exit 1; }

$(VENV)/.installed: pyproject.toml constraints.txt | $(BIN)/python
	$(call install,$(VENV),--editable .)
	@touch $@

$(VENV)/.installed-dev: pyproject.toml constraints.txt | $(BIN)/python
	$(call install,$(VENV),--editable '.[$(EXTRAS)]')
	@touch $@ $(VENV)/.installed

$(NEWEST)/.installed: export PIP_CONSTRAINT :=
$(NEWEST)/.installed: pyproject.toml
	$(PYTHON) -m venv $(NEWEST)
	$(NEWEST)/bin/python $(PIP_INSTALL) --upgrade --upgrade-strategy eager --editable '.[$(EXTRAS)]'
	@touch $@

$(OLDEST)/.installed: export PIP_CONSTRAINT :=
$(OLDEST)/.installed: pyproject.toml
	$(PYTHON) -m venv $(OLDEST)
	$(OLDEST)/bin/python $(PIP_INSTALL) --editable '.[$(EXTRAS)]' \
		$$($(PYTHON) tools/oldest_versions.py torch transformers)
	@touch $@

# The paper's code and transformer-lens ask for much that is not used here, so without their requirements.
$(BENCH)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(BENCH)
	$(BENCH)/bin/python -m pip install --quiet --editable . accelerate beartype better_abc einops fancy_einsum \
		python-dotenv typeguard wandb sae-lens==6.54.12 eai-sparsify==1.3.3
	$(BENCH)/bin/python -m pip install --quiet --no-deps e2e-sae==2.1.1 transformer-lens==3.9.0 dictionary-learning==0.1.0
	@touch $@
