# All targets run in .venv, built once from the extras of setup.py at the versions of constraints.txt.

PYTHON ?= python3
BACKENDS ?= tensorflow jax torch
WORKERS ?= 2
PYTEST_ARGS ?=
FILE ?= training/augmentation.py
SAMPLE ?= 20
# The other tests on JAX run without XLA's optimizations, which take longer than tiny models.
JAX_DEFAULTS_TESTS := tests/layers/test_blocks.py tests/layers/test_initial_values.py \
	tests/test_families.py::test_logits_match_the_reference

VENV := .venv
READY := $(VENV)/ready
AXE := $(VENV)/axe
SERVERS := .venv-servers
TRACKERS := .venv-trackers
RUN := $(VENV)/bin/python

# Hides TensorFlow's start-up messages, but not its errors.
export TF_CPP_MIN_LOG_LEVEL ?= 2

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help setup axe demo test test-jax-defaults slow dense servers trackers lint docs dist installs mutation notebooks bench clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "  make %-17s %s\n", $$1, $$2}' Makefile

setup: $(READY) ## build .venv with everything that the other targets need

# The stamp is a file in .venv, written last: --clear removes it, so an interrupted set-up starts again.
$(READY): setup.py constraints.txt
	@echo "== set-up: $(VENV), some minutes and 4 GB the first time =="
	$(PYTHON) -m venv --clear $(VENV)
	$(RUN) -m pip install -c constraints.txt -e '.[test]'
	@touch $@

axe: $(AXE) ## install axe-core, with which tests check the accessibility of web pages (npm)

$(AXE): $(READY) $(wildcard tests/package-lock.json)
	@npm ci --prefix tests --no-audit --no-fund || echo "npm cannot install axe-core: tests of accessibility are skipped."
	@touch $@

demo: setup ## train tnt_digits, export it, and compare Keras, SavedModel and ONNX
	$(RUN) training/demo.py

lint: setup ## check format, docstrings, spelling and the direction of imports
	$(RUN) -m ruff format --check .
	$(RUN) -m ruff check .
	$(RUN) -m codespell_lib
	$(RUN) -c 'from importlinter.cli import lint_imports_command as lint; lint()' --no-cache

test: setup axe ## run lint and the fast tests on each backend (BACKENDS=jax, WORKERS=4, PYTEST_ARGS='-k onnx')
	@passed=; failed=; \
	$(MAKE) --no-print-directory lint && passed=lint || failed=lint; \
	$(call on_each_backend,not slow)

test-jax-defaults: setup ## run a few tests on JAX with its default optimization and random functions
	KERAS_BACKEND=jax KERAS_TNT_TEST_JAX_DEFAULTS=1 $(RUN) -m pytest -n $(WORKERS) --dist worksteal -m 'not slow' $(PYTEST_ARGS) $(JAX_DEFAULTS_TESTS)

slow: setup axe ## run the slow tests on each backend: training runs, exports of every kind, kills
	@passed=; failed=; $(call on_each_backend,slow)

# Each backend runs even if lint or another backend failed; the exit status is that of all.
define on_each_backend
for backend in $(BACKENDS); do \
	printf '\n== tests on %s: $(1) ==\n' $$backend; \
	KERAS_BACKEND=$$backend $(RUN) -m pytest --ignore=tests/dense -n $(WORKERS) --dist worksteal -m '$(1)' $(PYTEST_ARGS) && \
		passed="$$passed $$backend" || failed="$$failed $$backend"; \
done; \
if [ -n "$$failed" ]; then printf '\n== failed: %s ==\n' "$$failed" >&2; exit 1; fi; \
printf '\n== passed: %s ==\n' "$$passed"
endef

dense: setup ## test detectors and segmenters with KerasHub's heads, on each backend
	@failed=; \
	for backend in $(BACKENDS); do \
		printf '\n== tests/dense on %s ==\n' $$backend; \
		KERAS_BACKEND=$$backend $(RUN) -m pytest tests/dense $(PYTEST_ARGS) || failed="$$failed $$backend"; \
	done; \
	if [ -n "$$failed" ]; then printf '\n== failed: %s ==\n' "$$failed" >&2; exit 1; fi

servers: setup axe $(SERVERS)/ready ## run the tests with real servers, Triton and MLServer, in a separate environment
	KERAS_BACKEND=tensorflow $(RUN) -m pytest tests/servers $(PYTEST_ARGS)

# The page in savedmodels/web needs onnxruntime-web from npm; its test is skipped without.
$(SERVERS)/ready: tests/servers/requirements.txt savedmodels/web/package-lock.json
	@echo "== set-up: $(SERVERS), a few minutes and 0.5 GB the first time =="
	$(PYTHON) -m venv --clear $(SERVERS)
	$(SERVERS)/bin/python -m pip install -r tests/servers/requirements.txt
	@npm ci --prefix savedmodels/web --no-audit --no-fund || echo "npm gives no onnxruntime-web."
	@touch $@

trackers: $(TRACKERS)/ready ## test the loggers with MLflow and W&B, offline, in a separate environment
	KERAS_BACKEND=jax WANDB_MODE=offline $(TRACKERS)/bin/python -m pytest tests/training/test_loggers.py $(PYTEST_ARGS)

$(TRACKERS)/ready: tests/training/trackers.txt
	@echo "== set-up: $(TRACKERS), a few minutes and 0.9 GB the first time =="
	$(PYTHON) -m venv --clear $(TRACKERS)
	$(TRACKERS)/bin/python -m pip install -r tests/training/trackers.txt
	@touch $@

# The NumPy backend starts fastest; pages are built from docstrings and tables, without computation.
docs: setup ## build the site in build/docs; broken links and undocumented public names are errors
	KERAS_BACKEND=numpy $(RUN) -m sphinx -E -W --keep-going -q docs build/docs

dist: setup ## build sdist and wheel in dist/ twice, check reproducibility and metadata
	$(RUN) tests/release.py build

installs: dist ## install dist/ into clean environments: each extra alone, oldest and newest versions
	$(RUN) tests/release.py install

mutation: setup ## run mutation testing on FILE with its tests (SAMPLE=50)
	$(RUN) tests/mutation.py $(FILE) --sample $(SAMPLE)

notebooks: setup ## re-run the notebooks of examples/ and save their outputs
	$(RUN) -m tests.helpers.notebooks

bench: setup ## measure speed on each backend, and timm's if it is installed
	$(RUN) benchmarks/speed.py

clean: ## remove .venv, runs/ and caches; exported models stay
	rm -rf $(VENV) $(SERVERS) $(TRACKERS) savedmodels/web/node_modules tests/node_modules runs *.egg-info build dist .pytest_cache .ruff_cache
	find . -name __pycache__ -prune -exec rm -rf {} +
