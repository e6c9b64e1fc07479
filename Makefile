# make demo, make test: each makes .venv and installs what it needs by itself.
PYTHON ?= python3
CONFIG ?= smoke
CT ?=
export PATH := $(CURDIR)/.venv/bin:$(PATH)

.PHONY: demo test lint bench env clean
.DEFAULT_GOAL := demo

demo: .venv/run.stamp  ## The whole chain on phantoms, or on CT=/path/to/dicom; then the weights that ship.
	CONFIG="$(CONFIG)" DATA="$(CT)" bash scripts/demo.sh

test: .venv/dev.stamp  ## The tests.
	python -m pytest -n auto --dist loadfile

lint: .venv/dev.stamp  ## Format, rules and types.
	ruff format --check .
	ruff check .
	pyright

bench: .venv/dev.stamp  ## Speed and memory, as ratios measured side by side.
	set -e; for script in benchmarks/*.py; do python -m benchmarks.$$(basename $$script .py); done

clean:  ## Removes the environment and caches; results in work/ stay.
	rm -rf .venv .pytest_cache .ruff_cache

env: .venv/run.stamp  ## The environment, .venv.

.venv/bin/uv:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed; set PYTHON=")'
	$(PYTHON) -m venv .venv
	.venv/bin/python -m pip install --quiet --disable-pip-version-check uv==0.13.8

.venv/run.stamp: .venv/bin/uv requirements.txt
	.venv/bin/uv pip install --quiet --python .venv/bin/python -r requirements.txt
	touch $@

.venv/dev.stamp: .venv/bin/uv requirements.txt requirements-dev.txt
	.venv/bin/uv pip install --quiet --python .venv/bin/python -r requirements-dev.txt
	touch $@ .venv/run.stamp
