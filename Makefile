# make demo   set up, then the main job on the embedded digits
# make test   set up, then the tests (make test-slow: the slow, distributed and browser ones; make test-loggers: those
#             of logging libraries, in .venv-loggers; make test-newest: with the newest torch and all else, in .venv-newest)
# make docs   set up, then the site, into site/
PYTHON ?= python3
VENV := .venv
CONSTRAINTS := constraints.txt
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: demo test test-slow test-loggers test-newest check docs clean

demo: $(READY)
	$(BIN)/nepa pretrain recipes.vision:digits

test: $(READY)
	$(BIN)/python -m pytest -n auto

test-slow: $(READY)
	$(BIN)/python -m pytest -n 2 --dist loadfile -m "slow or distributed or browser"

test-newest:
	$(MAKE) test VENV=.venv-newest CONSTRAINTS=constraints-newest.txt

test-loggers: .venv-loggers/.ready
	.venv-loggers/bin/python -m pytest -m "slow or not slow" tests/nepa_core/runtime/test_loggers.py

# on top of .venv, and without constraints: these libraries hold back what others need newer
PURELIB := -c "import sysconfig; print(sysconfig.get_path('purelib'))"
.venv-loggers/.ready: $(READY)
	$(PYTHON) -m venv .venv-loggers
	$(CURDIR)/$(BIN)/python $(PURELIB) > "$$(.venv-loggers/bin/python $(PURELIB))/base.pth"
	.venv-loggers/bin/python -m pip install --quiet --disable-pip-version-check --editable '.[wandb,mlflow,trackio]'
	@touch $@

check: $(READY)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

docs: $(VENV)/.ready-docs
	$(BIN)/python -m sphinx -E -q -W --keep-going -c docs . site

$(VENV)/.ready-docs: $(READY)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint $(CONSTRAINTS) --editable '.[docs]'
	@touch $@

$(READY): pyproject.toml $(CONSTRAINTS)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "nepa needs Python 3.11 or newer: make $(MAKECMDGOALS) PYTHON=python3.11" >&2; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint $(CONSTRAINTS) --editable '.[dev]'
	@touch $(READY)

clean:
	rm -rf $(VENV) .venv-newest .venv-loggers site
