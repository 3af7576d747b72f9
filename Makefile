# `make demo` and `make test` need nothing but Python and pip: they make .venv once and reuse it.
# With packages already installed (a GPU machine without network): make demo PYTHON=python3 VENV=
PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0

ifeq ($(strip $(VENV)),)
RUN := PYTHONPATH=$(CURDIR) $(PYTHON)
READY :=
else
RUN := $(VENV)/bin/python
READY := $(VENV)/.ready
endif

.PHONY: demo test test-nightly clean

# torch first: the pinned CPU build must be there before anything else asks for a newer torch.
$(VENV)/.ready: setup.py pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install -q --upgrade pip "setuptools>=70.1" wheel
	$(VENV)/bin/python -m pip install -q "$(TORCH)" "triton==3.6.0; platform_system == 'Linux'"
	$(VENV)/bin/python -m pip install -q --no-build-isolation -e ".[demo,test]"
	touch $@

demo: $(READY)
	$(RUN) -m tpfuse.demo

test: $(READY)
	$(RUN) -m pytest tests -m "not nightly"

test-nightly: $(READY)
	$(RUN) -m pytest tests

clean:
	rm -rf .venv build dist *.egg-info demo-output
