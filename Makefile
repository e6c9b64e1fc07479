# Targets that need the environment .venv make it first.
PYTHON ?= python3
CONFIG ?= smoke
CT ?=
export PATH := $(CURDIR)/.venv/bin:$(PATH)

.PHONY: help demo test lint bench env clean
.DEFAULT_GOAL := help

help:  ## Lists the targets.
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "make %-6s %s\n", $$1, $$2 }' Makefile

demo: .venv/run.stamp  ## Runs the whole chain on phantoms, or on CT=/path/to/dicom, then the shipped weights.
	CONFIG="$(CONFIG)" DATA="$(CT)" bash scripts/demo.sh

test: .venv/dev.stamp  ## Runs the tests.
	python -m pytest -n auto --dist loadfile

lint: .venv/dev.stamp  ## Checks format, rules and types.
	ruff format --check .
	ruff check .
	pyright

bench: .venv/dev.stamp  ## Measures speed and memory, mostly as ratios to other ways of doing the same.
	set -e; for script in benchmarks/[a-z]*.py; do python -m benchmarks.$$(basename $$script .py); done

env: .venv/run.stamp  ## Makes the environment .venv.

clean:  ## Removes the environment and caches; results in work/ stay.
	rm -rf .venv .pytest_cache .ruff_cache

.venv/bin/uv:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed; set PYTHON=")'
	$(PYTHON) -m venv .venv
	.venv/bin/python -m pip install --quiet --disable-pip-version-check uv==0.13.8

.venv/run.stamp: .venv/bin/uv requirements.txt
	.venv/bin/uv pip install --quiet --python .venv/bin/python -r requirements.txt
	touch $@

.venv/dev.stamp: .venv/bin/uv requirements.txt requirements/dev.txt
	.venv/bin/uv pip install --quiet --python .venv/bin/python -r requirements/dev.txt
	touch $@ .venv/run.stamp
