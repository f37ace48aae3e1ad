PYTHON ?= python3
BIN := .venv/bin
# One compilation cache for tests and demo: JAX compile time dominates both.
export JAX_COMPILATION_CACHE_DIR ?= $(CURDIR)/.cache/jax
export JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS ?= 0.3

.PHONY: demo bench docs docs-check test test-long test-jax lint format clean

demo: .venv/.installed  ## strategies on two problems; tables, plots and reports in results/demo
	$(BIN)/python -m benchmarks.demo --out results/demo $(ARGS)

test: .venv/.installed  ## lint, types, unit tests, doctests, pages and a notebook
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright & types=$$!; \
	XLA_FLAGS="$$($(BIN)/python -m tests.xla_flags)" \
	  $(BIN)/pytest -n auto --dist loadfile --no-loadscope-reorder -m "not long" $(ARGS); \
	tests=$$?; wait $$types && exit $$tests

test-long: .venv/.installed  ## the other tests; 20,000 steps of each strategy; 2,000 programs: 80 minutes
	XLA_FLAGS="$$($(BIN)/python -m tests.xla_flags)" \
	  $(BIN)/pytest -n auto --dist loadfile --no-loadscope-reorder -m long $(ARGS)
	$(BIN)/python -m tests.long_runs
	$(BIN)/python -m tests.programs 2000

# The library's own tests with another JAX, and what else WITH names: see CONTRIBUTING.md.
OTHER = .cache/jax-$(VERSION)
test-jax: ## make test-jax VERSION=0.9.0 WITH="flax==0.12.2 optax==0.2.6"
	test -x $(OTHER)/bin/python || $(PYTHON) -m venv $(OTHER)
	$(OTHER)/bin/python -m pip install --quiet "jax==$(VERSION)" $(WITH) --editable . \
	  beartype chex equinox jaxtyping matplotlib pytest pytest-xdist rich scipy tyro
	XLA_FLAGS="$$($(OTHER)/bin/python -m tests.xla_flags)" JAX_COMPILATION_CACHE_DIR= \
	  $(OTHER)/bin/python -m pytest -n auto --dist loadfile --no-loadscope-reorder $(ARGS) \
	  -m "not long" -W "default::DeprecationWarning" -W "default:Casting complex values" tests mtl_optax $(addprefix --ignore=tests/, \
	  test_docs.py test_bench.py test_compare.py test_benchmark_data.py test_aggregate_time.py \
	  test_accuracy.py test_known_answers.py test_torchjd.py test_plots.py test_site.py)

# A Python with the extra "bench", which adds TorchJD; without it only our side runs.
BENCH ?= $(BIN)/python

bench: .venv/.installed  ## cost of steps, aggregators, memory, compiling and scaling, into docs/
	$(BENCH) -m benchmarks.step_time
	$(BENCH) -m benchmarks.aggregate_time
	$(BENCH) -m benchmarks.memory
	$(BENCH) -m benchmarks.compile_time
	$(BENCH) -m benchmarks.scaling
	$(BENCH) -m benchmarks.accuracy
	$(BIN)/python -m benchmarks.cost_report

docs: .venv/.installed  ## the site, into site/; any warning fails
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

docs-check: docs  ## every page in headless Chromium, no network; pictures in results/screenshots
	$(BIN)/python docs/_check.py site --screenshots results/screenshots

lint: .venv/.installed
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/pyright

format: .venv/.installed
	$(BIN)/ruff check --fix . ; $(BIN)/ruff format .

.venv/.installed: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	touch $@

clean:
	rm -rf .venv .cache results site
