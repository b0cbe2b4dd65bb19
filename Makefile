# `make demo` and `make test` need python3 with venv, gcc and make; everything else is set up here, from uv.lock.
PYTHON ?= python3
UV_VERSION := 0.13.9
DEV := .venv
DEMO := .venv-demo

.PHONY: demo test test-root test-card soak lint bench clean

demo: $(DEMO)/.ready
	@echo "== first run: builds the environment, starts the daemon and the workers"
	@rm -rf demo-output
	@$(DEMO)/bin/python examples/digits_sweep.py
	@echo
	@echo "== second run: environment and workers are warm"
	@$(DEMO)/bin/python examples/digits_sweep.py
	@echo
	-@$(DEMO)/bin/remotectl status

test: $(DEV)/.ready
	$(DEV)/bin/python -m pytest -m "not root" -n 2 --dist loadfile $(TESTS)

test-root: $(DEV)/.ready
	bash tests/root/setup.sh
	$(DEV)/bin/python -m pytest -m root $(TESTS)

# On a machine with a card that nobody uses, as root: make test-card TORCH=/path/to/a/python/with/PyTorch
test-card: $(DEV)/.ready
	bash tests/root/setup.sh
	REMOTED_TEST_TORCH=$(TORCH) $(DEV)/bin/python -m pytest -s tests/card

# Long ones, by hand; the figures go into docs/reliability.md.
soak: $(DEV)/.ready
	bash tests/root/setup.sh
	REMOTED_TEST_IMAGES=1500 $(DEV)/bin/python -m pytest -m root tests/root/test_power_loss.py
	REMOTED_TEST_POINTS=0 REMOTED_TEST_REPORT=$(CURDIR)/soak.txt $(DEV)/bin/python -m pytest -m root tests/root/test_injection.py
	REMOTED_TEST_KILLS=1000 REMOTED_TEST_REPORT=$(CURDIR)/soak.txt $(DEV)/bin/python -m pytest -m root tests/root/test_kills.py
	REMOTED_TEST_RESTARTS=50 REMOTED_TEST_CUTS=50 REMOTED_TEST_REPORT=$(CURDIR)/soak.txt $(DEV)/bin/python -m pytest -m root tests/root/test_vm.py
	for round in $$(seq 20); do $(DEV)/bin/python -m pytest -q tests/faults/test_daemon_deaths.py tests/integration/test_run_ahead.py || exit 1; done

lint: $(DEV)/.ready
	$(DEV)/bin/ruff check .
	$(DEV)/bin/lint-imports
	$(DEV)/bin/mypy
	$(DEV)/bin/mypy tests/typing/reveal.py
	$(DEV)/bin/pyright

bench: $(DEV)/.ready
	$(DEV)/bin/python benchmarks/run.py $(BENCH)

clean:
	rm -rf $(DEV) $(DEMO) demo-output dist build .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache

$(DEV)/.ready: pyproject.toml uv.lock
	$(PYTHON) -m venv $(DEV)
	$(DEV)/bin/python -m pip install --quiet --disable-pip-version-check uv==$(UV_VERSION)
	UV_PROJECT_ENVIRONMENT=$(DEV) $(DEV)/bin/uv sync --quiet --frozen --extra daemon --group dev
	touch $@

$(DEMO)/.ready: pyproject.toml uv.lock
	$(PYTHON) -m venv $(DEMO)
	$(DEMO)/bin/python -m pip install --quiet --disable-pip-version-check uv==$(UV_VERSION)
	UV_PROJECT_ENVIRONMENT=$(DEMO) $(DEMO)/bin/uv sync --quiet --frozen --extra daemon --no-default-groups
	touch $@
