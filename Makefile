# `make tutorial` and `make test` need only Python 3.11 to 3.13 with pip: the first call makes .venv with the pins of
# requirements.txt, later calls reuse it. Every path is relative, so the folder's name may have spaces.

PYTHON ?= python3
PY := .venv/bin/python
READY := .venv/ready
NBVAL := --nbval-lax --nbval-current-env --nbval-cell-timeout=600 --nbval-kernel-startup-timeout=300

# Threads that wait do not spin: beside other work on the machine, tests and notebooks are several times faster.
export OMP_WAIT_POLICY ?= passive

.PHONY: tutorial test study colab lab clean help

tutorial: $(READY)  ## run all notebooks, in order, into build/ (the default)
	$(PY) notebooks/run.py

test: export HF_HUB_OFFLINE = 1  # no test fetches weights; notebook 02 does without CLIP's
test: $(READY)  ## unit tests, then every notebook, its marked outputs compared with the committed ones
	$(PY) -m pytest $(NBVAL) tests notebooks

study: $(READY)  ## every table over seeds, anew (about 90 minutes on two cores beside other jobs); goes on where it was, "make clean study" begins with nothing
	$(PY) data/birdworld/study.py
	$(PY) data/birdworld/claims.py

colab: $(READY)  ## badge and first cell of every notebook from pyproject.toml; REPO=owner/name moves all addresses there
	$(PY) notebooks/colab.py $(if $(REPO),--repo "$(REPO)")

lab: $(READY)  ## open the notebooks in JupyterLab
	$(PY) -m jupyterlab --LabApp.default_url=/lab/tree/notebooks/00_tour.ipynb

clean:  ## remove build/ and caches (the environment stays: remove .venv by hand)
	rm -rf build .pytest_cache
	find . -name .venv -prune -o -type d '(' -name __pycache__ -o -name .ipynb_checkpoints ')' -prune -exec rm -rf '{}' +

help:  ## list these targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "make %-9s %s\n", $$1, $$2}' Makefile

# The editable install remembers where it was made, so a folder that was moved or copied installs once more.
ifneq ($(shell cat $(READY) 2>/dev/null),$(shell pwd -P))
.PHONY: $(READY)
endif

$(READY): requirements.txt pyproject.toml
	@$(PY) -m pip --version >/dev/null 2>&1 || { \
	  "$(PYTHON)" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' || { \
	    echo 'dealkit needs Python 3.11, 3.12 or 3.13, and "$(PYTHON)" is not one of them.'; \
	    echo 'Say which one to use, for instance: make PYTHON=python3.12 $(or $(MAKECMDGOALS),tutorial)'; \
	    exit 1; }; \
	  echo 'Making .venv: the first time this takes some minutes and up to 6 GB of disk.'; \
	  "$(PYTHON)" -m venv --clear .venv; }
	$(PY) -m pip install --disable-pip-version-check -r requirements.txt
	$(PY) -m pip install --disable-pip-version-check --quiet --no-deps --no-build-isolation -e .
	@pwd -P > $(READY)
