# Every target sets up .venv first if it is missing.  On a machine without make, see "Without make" in README.md.
PYTHON ?= python3
PY := .venv/bin/python

.PHONY: demo test lab chapters bench clean

demo: .venv/core
	$(PY) -m minildm demo

test: .venv/all
	$(PY) tests/run.py

lab: .venv/all
	$(PY) -m jupyter lab chapters

chapters: .venv/all
	$(PY) tests/execute_chapters.py

bench: .venv/all
	$(PY) tests/benchmarks/run.py

clean:
	rm -rf .venv build dist *.egg-info .pytest_cache .ruff_cache .coverage

.venv/core: pyproject.toml constraints.txt
	test -x $(PY) || $(PYTHON) -m venv .venv
	$(PY) -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable .
	touch $@

.venv/all: pyproject.toml constraints.txt
	test -x $(PY) || $(PYTHON) -m venv .venv
	$(PY) -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[notebooks,test]'
	touch .venv/core $@
