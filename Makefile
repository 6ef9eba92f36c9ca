# Every target sets up .venv first if it is missing.  On a machine without make, see "Without make" in README.md.
PYTHON ?= python3
PY := .venv/bin/python

.PHONY: demo test lab chapters assignments site bench clean

demo: .venv/core
	$(PY) -m minildm demo

test: .venv/all
	$(PY) tests/run.py

lab: .venv/all
	$(PY) -m jupyter lab chapters

chapters: .venv/all
	$(PY) tests/execute_chapters.py

assignments: .venv/class
	$(PY) chapters/assignments.py generate

site: .venv/site
	$(PY) chapters/site/build.py

bench: .venv/all
	$(PY) tests/benchmarks/run.py

clean:
	rm -rf .venv build dist *.egg-info .pytest_cache .ruff_cache .coverage

.venv/core: pyproject.toml constraints.txt
	test -x $(PY) || $(PYTHON) -m venv .venv
	$(PY) -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable .
	touch $@

.venv/class: pyproject.toml constraints.txt
	test -x $(PY) || $(PYTHON) -m venv .venv
	$(PY) -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[class]'
	touch .venv/core $@

.venv/site: pyproject.toml constraints.txt
	test -x $(PY) || $(PYTHON) -m venv .venv
	$(PY) -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[site]'
	touch .venv/core $@

.venv/all: pyproject.toml constraints.txt
	test -x $(PY) || $(PYTHON) -m venv .venv
	$(PY) -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[notebooks,test]'
	touch .venv/core $@
