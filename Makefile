# `make demo` and `make test` need nothing but Python (3.10 or newer) and pip: they make .venv once and reuse it.
#
#   make demo PYTHON=python3 VENV=     use the packages that are installed, install nothing (a GPU machine, no network)
#   make demo TORCH_INDEX=URL          take torch from this index: that of the small CPU builds, say
PYTHON ?= python3
VENV ?= .venv
TORCH_INDEX ?=
# Processes that run tests side by side; 0 for one after the other. Each begins with one half of the files, so that what
# the tests of a file share is made once, and ends with what is left of the other half.
JOBS ?= 2

ifeq ($(strip $(VENV)),)
RUN := PYTHONPATH=$(CURDIR)$${PYTHONPATH:+:$$PYTHONPATH} $(PYTHON)
READY := installed-packages
else
RUN := $(VENV)/bin/python
READY := $(VENV)/.ready
endif
PIP := $(VENV)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
FROM_INDEX := $(if $(strip $(TORCH_INDEX)),--index-url $(TORCH_INDEX))

.PHONY: demo lint docs-check test test-nightly test-matrix clean installed-packages

# torch first: the pinned build must be there before anything else asks for a newer one.
ifneq ($(strip $(VENV)),)
$(VENV)/.ready: setup.py pyproject.toml constraints.txt
	@echo "making $(VENV) (once; a few minutes with a slow network)"
	$(PYTHON) -m venv $(VENV)
	$(PIP) --upgrade pip "setuptools>=70.1" wheel
	$(PIP) $(FROM_INDEX) torch
	$(PIP) --no-build-isolation -e ".[demo,test]"
	@touch $@
endif

demo: NEEDS := torch dataclasses_json transformers accelerate safetensors
demo: $(READY)
	$(RUN) -m tpfuse demo

lint: NEEDS := ruff mypy
lint: $(READY)
	$(RUN) -m ruff check .
	$(RUN) -m mypy

docs-check: NEEDS := torch dataclasses_json pytest pytest_timeout matplotlib
docs-check: $(READY)
	$(RUN) -m pytest tests/test_docs.py tests/test_performance_docs.py -m docs -p no:cacheprovider

test: NEEDS := torch dataclasses_json transformers accelerate safetensors pytest pytest_timeout hypothesis expecttest
test: $(READY)
	$(RUN) -m pytest tests -m "not nightly and not docs" $(if $(filter-out 0,$(JOBS)),-n $(JOBS) --dist worksteal)

test-nightly: NEEDS := torch dataclasses_json transformers accelerate safetensors pytest pytest_timeout hypothesis expecttest
test-nightly: $(READY)
	$(RUN) -m pytest tests $(if $(filter-out 0,$(JOBS)),-n $(JOBS) --dist worksteal)

# One environment for each release of torch (.venv-2.11, ..., .venv-newest; about 5 GB each) and the suite in each.
# MATRIX="--torch 2.12 tests/passes" runs a part of it.
MATRIX ?=
test-matrix: NEEDS := typer rich
test-matrix: $(READY)
	$(RUN) benchmarks/versions.py $(MATRIX)

# With VENV= nothing is installed, so say at once what is not there. The metadata in tpfuse.egg-info is what lets torch
# find the backend by its name; without it the demo names the function instead.
installed-packages:
	@$(PYTHON) -c 'import importlib.util, sys; \
	missing = [name for name in sys.argv[1:] if importlib.util.find_spec(name) is None]; \
	missing and sys.exit("VENV= uses the installed packages, and these are missing: " + ", ".join(missing))' $(NEEDS)
	@$(PYTHON) setup.py -q egg_info 2>/dev/null || echo "(no setuptools: the backend is not found by its name)"

clean:
	rm -rf .venv build dist *.egg-info demo-output
