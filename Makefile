# Three tiers: quick (under 5 minutes), test (what .ci/run does, under 45), prove (once per issue).
PYTHON ?= python
WORKERS ?= 2

# One thread per worker: two workers with two threads each take longer on two cores.
export OMP_NUM_THREADS = 1
# A test that would reach the network fails instead.
export HF_HUB_OFFLINE = 1

.NOTPARALLEL:
.PHONY: help quick test prove lint types docs siblings

help:
	@echo "make quick | test | prove | lint | types | docs | siblings    (PYTHON=$(PYTHON), WORKERS=$(WORKERS))"

quick:
	$(PYTHON) -m pytest -n $(WORKERS) -m "not slow and not prove"

test: lint types docs
	$(PYTHON) -m pytest -n $(WORKERS) -m "not prove"

prove:
	$(PYTHON) -m pytest -m prove --timeout 0

lint:
	$(PYTHON) -m ruff check src tests training
	$(PYTHON) -m ruff format --check src tests training

types:
	$(PYTHON) -m mypy

# Without --quiet: it would keep --strict from seeing the warnings.
docs:
	NO_MKDOCS_2_WARNING=1 $(PYTHON) -m mkdocs build --strict --site-dir site

# What the organism and its siblings agree about: an atlas of each (kept in build/, gone on with if stopped), then the page.
SIBLINGS = zoo:organism $(wildcard organisms/sibling-*)
siblings:
	for model in $(SIBLINGS); do $(PYTHON) -m headwise atlas $$model --out build/atlas-$${model##*[:/]} || exit $$?; done
	$(PYTHON) -m headwise.atlas.report.siblings docs/siblings.md build/atlas-*
