# Each environment is made once, and again only when what it is made of changes.
PYTHON ?= python3
PIP = -m pip install --quiet --disable-pip-version-check
NEEDS = pyproject.toml tests/constraints.txt

.PHONY: demo test exam lint bench paper scale clean

demo: .venv/demo.stamp
	.venv/bin/zilc demo

test: .venv/test.stamp
	.venv/bin/python -m pytest -m "not long"

exam: .venv/test.stamp
	.venv/bin/python tools/exam.py
	.venv/bin/python -m pytest

lint: .venv-lint/lint.stamp
	.venv-lint/bin/ruff check .
	.venv-lint/bin/mypy

bench: .venv/test.stamp
	.venv/bin/python tools/bench.py

paper: .venv/test.stamp
	.venv/bin/python -W ignore::RuntimeWarning tools/paper_tables.py --write

scale: .venv/test.stamp
	.venv/bin/python tools/scale.py --write

.venv/bin/python:
	$(PYTHON) -m venv .venv

.venv/demo.stamp: $(NEEDS) | .venv/bin/python
	.venv/bin/python $(PIP) -e '.[demo]'
	touch $@

.venv/test.stamp: $(NEEDS) | .venv/bin/python
	.venv/bin/python $(PIP) -c tests/constraints.txt -e '.[test,demo]'
	touch $@ .venv/demo.stamp

.venv-lint/bin/python:
	$(PYTHON) -m venv .venv-lint

# mypy follows a strict editable install only, which pytest and python -m cannot work with: hence a second environment.
.venv-lint/lint.stamp: $(NEEDS) | .venv-lint/bin/python
	.venv-lint/bin/python $(PIP) -c tests/constraints.txt -e '.[dev]' --config-settings editable_mode=strict
	touch $@

clean:
	rm -rf .venv .venv-lint build dist demo out *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
