# make demo: see it work.  make test: run everything.  Needs Python 3.10 or newer and make, nothing else.

PYTHON ?= python3
PYTEST_ARGS ?=
BENCH_ARGS ?= --rounds 3
# Worker processes of the suite. Most tests wait for processes of their own, so cores are no limit.
WORKERS ?= 2

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet

.PHONY: test test-pgbouncer demo bench lint wheel-smoke conformance differential chaos clean help
.NOTPARALLEL:

help:
	@echo "make demo         a chord over the standard library, while workers are killed and the broker forgets"
	@echo "make test         the whole suite; PYTEST_ARGS='-k reaper' for a part"
	@echo "make test-pgbouncer  a part of the suite through PgBouncer in transaction mode"
	@echo "make bench        beside Celery's own backends; BENCH_ARGS='--questions chord,get --quick' for a part"
	@echo "make lint         ruff, mypy --strict, import-linter"
	@echo "make wheel-smoke  build the wheel, install it elsewhere, use it"
	@echo "make conformance  Celery's own integration suites on its backends and on ours; VERSIONS= BROKERS= BACKENDS= FILES="
	@echo "make differential random canvases on Celery's Redis backend and on ours, then all named ones in every pool; CANVASES= SEED="
	@echo "make chaos        the crash campaign; SEED= SCENARIO= BACKEND=ours|redis|database|all CHAOS_ARGS='--chords 24 --list'"
	@echo "make clean        remove the environment and all caches"

demo: $(VENV)/.demo
	$(BIN)/python -m examples.demo

test: $(VENV)/.test
	$(BIN)/python -m pytest --numprocesses=$(WORKERS) --dist=worksteal $(PYTEST_ARGS)

# What cuts the server's own connections is left out: PgBouncer's clients do not feel it.
POOLED := test_canvases test_counting test_dispatch test_effects test_hazard_03_blips test_hazards_claims test_hazards_leases \
	test_hazards_outbox test_poison test_repair

test-pgbouncer: $(VENV)/.test
	PGBARRIER_TEST_PGBOUNCER=1 $(BIN)/python -m pytest --numprocesses=$(WORKERS) --dist=worksteal \
		-k 'not connections_that_are_cut' $(POOLED:%=tests/integration/%.py) \
		'tests/acceptance/test_pools.py::test_a_member_is_killed_once[prefork-defaults]'

bench: $(VENV)/.test $(VENV)/.bench
	$(BIN)/python -m benchmarks.bench $(BENCH_ARGS)

lint: $(VENV)/.lint
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy --strict
	$(BIN)/lint-imports

wheel-smoke: $(VENV)/.lint
	tests/smoke/run $(BIN)/python

# A selection is words in quotes: make conformance VERSIONS=5.7.0 FILES='test_canvas test_tasks'
conformance: $(VENV)/.test
	$(BIN)/python -m tests.conformance $(if $(VERSIONS),--versions='$(VERSIONS)') $(if $(BROKERS),--brokers='$(BROKERS)') \
		$(if $(BACKENDS),--backends='$(BACKENDS)') $(if $(FILES),--files='$(FILES)') $(CONFORMANCE_ARGS)
	$(if $(VERSIONS)$(BROKERS)$(BACKENDS)$(FILES)$(CONFORMANCE_ARGS),,$(MAKE) differential)

differential: $(VENV)/.test
	PGBARRIER_TEST_CANVASES=$(or $(CANVASES),3300) PGBARRIER_TEST_SEED=$(or $(SEED),11) $(BIN)/python -m pytest -s tests/differential
	PGBARRIER_TEST_LONG=1 $(BIN)/python -m pytest tests/acceptance/test_canvases.py tests/cluster

# A failure is replayed by its seed and scenario: make chaos SEED=7 SCENARIO='mixture 3'
chaos: $(VENV)/.test
	$(BIN)/python -m tests.chaos $(if $(SEED),--seed='$(SEED)') $(if $(SCENARIO),--scenario='$(SCENARIO)') \
		$(if $(BACKEND),--backend='$(BACKEND)') $(CHAOS_ARGS)

clean:
	rm -rf $(VENV) build dist *.egg-info .hypothesis .import_linter_cache .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# A stamp an extra, so that the demo does not wait for the tests' packages.
$(VENV)/.python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python 3.10 or newer is needed: make PYTHON=python3.x")'
	$(PYTHON) -m venv --clear $(VENV)
	touch $@

$(VENV)/.demo $(VENV)/.test $(VENV)/.bench $(VENV)/.lint: $(VENV)/.%: $(VENV)/.python setup.cfg pyproject.toml
	$(PIP) install --editable '.[$*]'
	touch $@
