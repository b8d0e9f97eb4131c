# Everything a newcomer needs: make train, make test. PYTHON=python3.12 picks another interpreter.
PYTHON ?= python3
VENV ?= .venv
RUN = $(VENV)/bin/python
WORKDIR ?= runs/quickstart
# What the demo page asks: a model of the package, or a workdir.
MODEL ?= quickstart
PROTOCOL ?= seed
ROCKET ?= runs/rocket-$(PROTOCOL)
ABLATIONS ?= runs/ablations
WORKERS ?= 2
# glibc then keeps freed memory for the next step of a run instead of returning it to Linux
# (docs/memory.md, "Memory allocation on Linux"). Other systems ignore these.
KEEP = MALLOC_ARENA_MAX=1 MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=-1

# The tests start many processes, each of which would else compile all modules again.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: help setup setup-release train eval demo rocket ablations bench test test-release test-all package lint format docs docs-pages docs-serve clean

help:
	@echo "make train     set up, train the quickstart, evaluate it, print the table"
	@echo "make eval      evaluate WORKDIR=$(WORKDIR) again"
	@echo "make demo      a page to ask the model that comes with the package; MODEL=DIR for your own"
	@echo "make rocket    measure the language models against each other, PROTOCOL=$(PROTOCOL) (or"
	@echo "               heldout), into ROCKET=$(ROCKET)"
	@echo "make ablations what each part of SLAM v3 is worth, into ABLATIONS=$(ABLATIONS)"
	@echo "make bench     measure against torch and transformers (docs/speed.md); ONLY=a,b for some"
	@echo "make test      set up, lint, type-check and run the tests, in WORKERS=$(WORKERS) processes"
	@echo "make test-release  longer tests: whole runs, browsers, several devices, the docs, the package"
	@echo "make test-all  all of them, with the slow tests"
	@echo "make package   the wheel and the source distribution, built and checked, into dist/"
	@echo "make docs      the site of the documentation, into site/; make docs-serve shows it while you write"
	@echo "make format    sort imports and format"
	@echo "make clean     remove caches (not runs, not the environment)"

$(VENV)/.installed: setup.cfg setup.py pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --disable-pip-version-check --upgrade pip
	$(RUN) -m pip install --quiet --disable-pip-version-check --editable '.[test]'
	touch $@

setup: $(VENV)/.installed

setup-release: setup
	$(RUN) -m pip install --quiet --disable-pip-version-check --editable '.[release]'

train: setup
	$(KEEP) $(RUN) train.py --config=configs/slam_v3_quickstart.py --workdir=$(WORKDIR)
	$(RUN) eval.py --workdir=$(WORKDIR)

eval: setup
	$(RUN) eval.py --workdir=$(WORKDIR)

demo: setup
	$(RUN) -m slam_jax.demo --workdir=$(MODEL)

rocket: setup
	$(RUN) -m slam_jax.rocket --protocol=$(PROTOCOL) --workdir=$(ROCKET)

ablations: setup
	$(KEEP) $(RUN) -m slam_jax.rocket --protocol=ablation --config=configs/ablations/sort_of_clevr.py \
		--workdir=$(ABLATIONS) --jobs=2

bench: setup
	$(RUN) -m pip install --quiet --disable-pip-version-check --editable '.[peers]'
	$(RUN) -m benchmarks $(if $(ONLY),--only=$(ONLY))

lint: setup
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m pyright

test: lint
	$(RUN) -m pytest -n $(WORKERS) --dist=worksteal

# One process a file, in order: the tests of a file share what it builds.
test-release: setup-release
	$(RUN) -m pytest -n $(WORKERS) --dist=loadfile --no-loadscope-reorder -m "release and not slow"

test-all: lint setup-release
	$(RUN) -m pytest -n $(WORKERS) --dist=worksteal -m "slow or not slow"

# Pages that are made: the notebooks of notebooks/ become docs/notebooks/*.md.
docs-pages: setup
	$(RUN) notebooks/convert.py

docs: docs-pages
	$(RUN) -m zensical build --clean --strict

docs-serve: docs-pages
	$(RUN) -m zensical serve

package: setup-release
	rm -rf build dist *.egg-info
	$(RUN) -m build
	$(RUN) -m twine check --strict dist/*
	$(RUN) -m check_wheel_contents dist/*.whl

format: setup
	$(RUN) -m ruff check --fix .
	$(RUN) -m ruff format .

clean:
	rm -rf .pytest_cache .ruff_cache .cache build dist site *.egg-info
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +
