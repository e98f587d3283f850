# Everything that one types often. `make` alone lists it.
#   PYTHON=python3.12   which Python the environment is made from (3.11 or 3.12)
#   ARGS="..."          handed on, to pytest mostly

PYTHON ?= python3
ARGS ?=
VENV := .venv
PY = $(VENV)/bin/python
# What is installed: all that running needs, and what testing needs beside it. The folder's own name is part of both
# stamps: in a copied tree the editable install still points at the old one.
HERE := $(firstword $(shell pwd | cksum))
RUNS := $(VENV)/.runs-$(HERE)
READY := $(VENV)/.ready-$(HERE)

# What `make constraints` holds in place while everything else takes its newest release.
HELD := torch==2.13.0 triton==3.7.1 deepspeed==0.19.8

export PIP_DISABLE_PIP_VERSION_CHECK := 1
# DeepSpeed comes as source. Its build imports torch (so torch is installed first, and the build is not isolated) and
# probes for a CUDA toolkit, failing where there is a GPU but no toolkit. Nothing is compiled at install time on any
# machine, so the build may as well take every machine for a CPU.
PIP_INSTALL = DS_ACCELERATOR=cpu DS_BUILD_OPS=0 $(PY) -m pip install --quiet --no-build-isolation

# $(call step,title,command): one line per step with the time it took; the command's output only if it fails.
define step
@printf '  %-52s' '$(1)'; begin=$$(date +%s); log=$$(mktemp); \
if { $(2); } >"$$log" 2>&1; then printf '%5d s\n' $$(($$(date +%s) - begin)); rm -f "$$log"; \
else printf ' failed\n'; cat "$$log" >&2; rm -f "$$log"; exit 1; fi
endef

define check-python
$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))' 2>/dev/null || { \
echo "Python 3.11 or 3.12 is needed, and '$(PYTHON)' is $$($(PYTHON) --version 2>/dev/null || echo missing);" \
"name another with: make setup PYTHON=python3.11" >&2; exit 1; }; \
$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || { \
echo "'$(PYTHON)' lacks its venv module (on Debian and Ubuntu: the package python3-venv)" >&2; exit 1; }
endef

comma := ,

.DEFAULT_GOAL := help
.PHONY: help setup demo demo-lora demo-vision test test-full faults gpu-check lint format constraints clean

help:  ## list these targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))

setup: $(READY)  ## make the environment in .venv (at once when nothing changed)
	@echo '$(VENV) is ready'

demo: $(RUNS)  ## set-up, then the whole main job on this machine: text to trained, exported model
	@$(PY) -m megakrause.demo

demo-lora: $(RUNS)  ## set-up, then a Llama of transformers goes on with a Krause branch and adapters, and back
	@$(PY) -m megakrause.demo_lora

demo-vision: $(RUNS)  ## set-up, then vision transformers and image models learn handwritten digits; ARGS="--seeds 5"
	@$(PY) -c 'import sklearn' 2>/dev/null || $(PIP_INSTALL) -c constraints.txt -e '.[demo]'
	@$(PY) -m megakrause.demo_vision $(ARGS)

# Two at a time, files whole: tests of a file share what is slow to start, and some start eight processes.
PYTEST = $(PY) -m pytest -n 2 --dist loadfile

test: setup  ## set-up, then the tests
	@$(PYTEST) -m "not slow" $(ARGS)

test-full: setup  ## set-up, then all tests with the long tail
	@$(PYTEST) $(ARGS)

faults: setup  ## set-up, then every test that breaks something on purpose (docs/reliability.md); up to 90 minutes
	@$(PYTEST) -m faults $(ARGS)

gpu-check: setup  ## on a machine with a CUDA GPU: check and time the kernels, train; writes gpu-report/
	@$(PY) tests/gpu_check.py

lint: setup  ## ruff and mypy; changes nothing
	@$(PY) -m ruff check .
	@$(PY) -m ruff format --check .
	@$(PY) -m mypy

format: setup  ## format the code and mend what ruff can mend
	@$(PY) -m ruff check --fix .
	@$(PY) -m ruff format .

clean:  ## delete caches and build leftovers (keeps .venv and runs)
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -path ./$(VENV) -prune -o -path ./runs -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +

constraints: VENV := build/constraints
constraints:  ## write constraints.txt anew: the newest releases, torch, triton and deepspeed held
	@$(check-python)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' || { \
	echo 'Only the oldest Python finds releases that all can take: make constraints PYTHON=python3.11' >&2; exit 1; }
	@rm -rf $(VENV) && $(PYTHON) -m venv $(VENV)
	$(call step,torch,$(PY) -m pip install --quiet setuptools wheel $(HELD:deepspeed%=))
	$(call step,everything else,$(PIP_INSTALL) $(HELD) -e '.[dev]')
	@{ echo '# What `make setup` installs, the same everywhere. Do not edit: `make constraints` writes this file from a clean'; \
	echo '# install. Local versions (+cpu) and the CUDA packages are left out: the first would shut out CUDA machines, and'; \
	echo '# torch itself names the second.'; \
	$(PY) -m pip freeze --all --exclude-editable | sed 's/+[a-z0-9.]*$$//' | grep -viE '^(pip|nvidia-.*|cuda-.*)=='; \
	} >build/constraints.txt
	@mv build/constraints.txt constraints.txt && rm -rf $(VENV)

$(RUNS): pyproject.toml constraints.txt
	@test -x $(PY) || { $(check-python); }
	@echo 'Setting up $(VENV)'
	$(call step,environment,$(PY) -m pip --version || $(PYTHON) -m venv --clear $(VENV))
	$(call step,torch and triton,$(PY) -m pip install --quiet -c constraints.txt setuptools wheel torch triton)
	$(call step,everything else and megakrause itself,$(PIP_INSTALL) -c constraints.txt -e .)
	$(call step,check,$(PY) -m pip check && $(PY) -c 'import torch$(comma) deepspeed$(comma) megakrause')
	@rm -f $(VENV)/.runs-* && touch $@

$(READY): $(RUNS)
	$(call step,tools for the tests,$(PIP_INSTALL) -c constraints.txt -e '.[dev]' && $(PY) -m pip check)
	@rm -f $(VENV)/.ready-* && touch $@
