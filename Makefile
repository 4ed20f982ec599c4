# Each environment is made once, and again only when what it is made of changes.
PYTHON ?= python3
# Processes of `make test`.
JOBS ?= 2
PIP = -m pip install --quiet --disable-pip-version-check
NEEDS = pyproject.toml tests/constraints.txt

.PHONY: demo test exam rivals zoo lint bench paper lowerings scale recompute profile cuda cuda-kernels figures browser vendor clean

demo: .venv/demo.stamp
	.venv/bin/zilc demo

test: .venv/test.stamp browser
	.venv/bin/python -m pytest -m "not long" -n $(JOBS) --dist loadfile

exam: .venv/test.stamp browser
	.venv/bin/python tools/exam.py
	.venv/bin/python -m pytest

rivals: .venv/test.stamp .venv-peers/bench.stamp .venv-ort-training/bench.stamp
	.venv/bin/python tools/rivals.py

lint: .venv-lint/lint.stamp
	.venv-lint/bin/ruff check .
	.venv-lint/bin/mypy

# BENCH="--networks mlp3 --peers zilc,torch" or BENCH=--write
bench: .venv/test.stamp .venv-ort-training/bench.stamp .venv-peers/bench.stamp
	.venv/bin/python tools/bench.py $(BENCH)

paper: .venv/test.stamp
	.venv/bin/python -W ignore::RuntimeWarning tools/paper_tables.py --write

# What each lowering of a gradient costs, fitted to measurements: zilc/lowerings.json and docs/LOWERINGS.md.
lowerings: .venv/test.stamp
	.venv/bin/python tools/fit_lowerings.py --write

# All that wants a GPU: costs of lowerings, exactness of networks and rules, times beside PyTorch; writes their pages.
cuda: .venv/cuda.stamp
	.venv/bin/python tools/fit_lowerings.py --device cuda --dtype float32,float16 --write
	.venv/bin/python tools/cuda_networks.py --write
	.venv/bin/python tools/cuda_check.py --write
	.venv/bin/python tools/bench.py --device cuda --precision float32,float16,bfloat16 --write

# What ONNX Runtime's CUDA provider has kernels for, by its document; needs no GPU.
cuda-kernels: .venv/test.stamp
	.venv/bin/python -W ignore tools/cuda_kernels.py --write

scale: .venv/test.stamp
	.venv/bin/python tools/scale.py --write

# Where a step's time goes, kernel by kernel, beside others' steps: docs/PROFILE.md.
profile: .venv/test.stamp .venv-ort-training/bench.stamp .venv-peers/bench.stamp
	.venv/bin/python -W ignore tools/profile_step.py --write

recompute: .venv/test.stamp
	.venv/bin/python tools/recompute.py --write

figures: .venv/test.stamp
	.venv/bin/python -W ignore::RuntimeWarning tools/figures.py

# The tests of pages look at them in Chromium or Chrome; without one they would fail, not be skipped.
browser: | .venv/bin/python
	.venv/bin/python tools/find_browser.py

# The drawing library of pages, from npm at the version that zilc/web/vendor.json pins.
vendor: | .venv/bin/python
	.venv/bin/python tools/vendor_web.py

zoo: .venv/test.stamp
	.venv/bin/python tools/export_zoo.py --write

.venv/bin/python:
	$(PYTHON) -m venv .venv

.venv/demo.stamp: $(NEEDS) | .venv/bin/python
	.venv/bin/python $(PIP) -e '.[demo]'
	touch $@

.venv/test.stamp: $(NEEDS) | .venv/bin/python
	.venv/bin/python $(PIP) -c tests/constraints.txt -e '.[test,demo]'
	touch $@ .venv/demo.stamp

.venv/cuda.stamp: .venv/test.stamp
	.venv/bin/python $(PIP) -c tests/constraints.txt -e '.[test,cuda]' nvidia-ml-py
	touch $@

.venv-lint/bin/python:
	$(PYTHON) -m venv .venv-lint

# mypy follows a strict editable install only, which pytest and python -m cannot work with: hence a second environment.
.venv-lint/lint.stamp: $(NEEDS) | .venv-lint/bin/python
	.venv-lint/bin/python $(PIP) -c tests/constraints.txt -e '.[dev]' --config-settings editable_mode=strict
	touch $@

# Peers of the benchmark whose own needs clash with zilc's. onnxruntime-training ended at 1.19, for the onnx and numpy
# of its time; it imports torch, and has no wheels for Python after 3.11. Where a peer cannot be had, the table says so.
.venv-ort-training/bench.stamp: Makefile
	test -x .venv-ort-training/bin/python || $(PYTHON) -m venv .venv-ort-training
	-.venv-ort-training/bin/python $(PIP) 'onnxruntime-training==1.19.2' 'onnx==1.16.2' 'numpy<2' torch && touch $@

.venv-peers/bench.stamp: Makefile
	test -x .venv-peers/bin/python || $(PYTHON) -m venv .venv-peers
	-.venv-peers/bin/python $(PIP) 'onnx-ad==0.3.0' jax onnxruntime && touch $@

clean:
	rm -rf .venv .venv-lint .venv-ort-training .venv-peers build dist demo out *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
