# Two commands do everything on a fresh machine: `make reproduce` and `make test`. Both set up .venv when it is missing.
# Another interpreter takes an environment of its own: make test PYTHON=python3.13 VENV=.venv-3.13
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
export HF_HUB_DISABLE_TELEMETRY := 1
export DO_NOT_TRACK := 1

.PHONY: reproduce test lab site export pages
reproduce: $(VENV)/installed
	$(BIN)/unloc reproduce $(ARGS)

test: $(VENV)/installed
	@echo "All tests: about an hour on two cores; one file of them with ARGS=tests/test_masked.py."
	$(BIN)/python -m pytest -n 2 --dist loadfile $(ARGS)

lab: $(VENV)/lab
	$(BIN)/jupyter lab --config=nbs/lab/config.py $(ARGS)

# The pages as a site in build/site, offline, from the results that the notebooks and figures/ store.
site: $(VENV)/site
	$(BIN)/python nbs/site/build.py $(ARGS)

# After editing notebooks: write unloc/*.py and clean what is not content.
export: $(VENV)/installed
	$(BIN)/nbdev-export
	$(BIN)/nbdev-clean

# After new figures: show them on the result pages.
pages: $(VENV)/installed
	$(BIN)/unloc pages

$(VENV)/installed: requirements.txt pyproject.toml
	$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11) and 'unloc needs Python 3.11 or later; name one with: make PYTHON=python3.11')"
	@echo "Setting up $(VENV), once: about 130 packages, some minutes of downloads, 2.1 GB of disk (6 GB where PyPI has torch with CUDA alone)."
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps -e .
	@echo "$(VENV) is ready."
	touch $@

$(VENV)/lab: $(VENV)/installed requirements-lab.txt
	@echo "Adding JupyterLab to $(VENV), once: a minute."
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-lab.txt
	touch $@

$(VENV)/site: $(VENV)/installed requirements-site.txt
	@echo "Adding Sphinx to $(VENV), once: a minute."
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-site.txt
	touch $@
