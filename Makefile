# make demo   sets everything up in .venv, trains on Shakespeare, writes text and a look inside
# make test   sets everything up in .venv and runs every check, as CI does
#
# The two knobs: make PYTHON=python3.12 demo, make TORCH=torch==2.14.0 test

PYTHON ?= python3
TORCH  ?= torch==2.13.0
JOBS   ?= 2

VENV := .venv
BIN  := $(VENV)/bin
RUN  := $(VENV)/.ready-to-run
DEV  := $(VENV)/.ready-to-test

# Many threads times many test processes is slower than one thread each. Each process begins with its own stretch of the
# tests, so that what a file prepares is prepared once, and takes from the other's at the end.
PYTEST := OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE $(BIN)/python -m pytest -n $(JOBS) --dist worksteal

# Half of what starting takes is compiling modules, unless Python may keep them.
export PYTHONDONTWRITEBYTECODE :=

.PHONY: help demo test static tests quick slow format check lint types layers wheel bench clean
.DEFAULT_GOAL := help

help: ## this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-8s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

# Ordinary commands, shown as they run: what you see is what you would type.
demo: $(RUN) ## train on Shakespeare, print samples, write a page that looks inside (3 minutes)
	@if [ -e demo ]; then old="demo.$$(date +%Y%m%d-%H%M%S)"; mv demo "$$old" && echo "the earlier demo is in $$old now"; fi
	$(BIN)/glassformer train shakespeare_char --out demo
	$(BIN)/glassformer generate demo "ROMEO:" --seed 1
	$(BIN)/glassformer generate demo "To be, or not to be" --seed 2
	$(BIN)/glassformer generate demo "First Citizen:" --seed 3 --temperature 0.5
	$(BIN)/glassformer look "O Romeo, Romeo! wherefore art thou Romeo?" --model demo --out demo/look.html
	@echo
	@echo "The model is in demo/, the loss curve is demo/loss.png, the look inside is demo/look.html: open it in a browser."
	@echo "What to try next (after: source $(BIN)/activate):"
	@echo '  glassformer generate demo "JULIET:" --temperature 1.2 --logprobs 3'
	@echo '  glassformer look "My lord, the king" --model demo'
	@echo '  glassformer train demo --resume --seconds 400              go on with this run'
	@echo '  glassformer train shakespeare_char --data your_text.txt    the same on a text of yours'
	@echo '  glassformer train shakespeare_char --set "model.blocks.*.attention.position=ALiBi"'

# The wheel needs none of the tools, so that it is checked while they are installed and run.
test: $(RUN) ## every check that CI runs
	@$(MAKE) --no-print-directory -j 2 static wheel
	@$(MAKE) --no-print-directory tests
	@echo "make test: everything passed."

static: $(DEV) check lint types layers

tests: $(DEV) ## all tests
	$(PYTEST) --durations=20

check: $(DEV) ## is the code formatted
	$(BIN)/ruff format --check .

lint: $(DEV) ## the linter
	$(BIN)/ruff check .

types: $(DEV) ## the type checker
	$(BIN)/mypy

layers: $(DEV) ## imports go down only
	$(BIN)/lint-imports

quick: $(DEV) ## the fast tests
	$(PYTEST) -m "not slow"

slow: $(DEV) ## the slow tests
	$(PYTEST) -m slow

wheel: $(RUN) ## build the wheel, install it into an empty environment, use it there
	$(BIN)/python scripts/check_wheel.py --torch "$(TORCH)"

format: $(DEV) ## format the code and sort the imports
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(DEV) ## every benchmark, one after the other
	@for file in benchmarks/*.py; do [ -e "$$file" ] || continue; echo "== $$file"; $(BIN)/python "$$file" || exit 1; done

clean: ## remove the environment and everything that was built; demo and runs stay
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	find src tests -name __pycache__ -type d -prune -exec rm -rf {} +

# torch first and by itself: its build (CPU or GPU) is chosen here and nothing later draws another one.
$(RUN): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "glassformer needs Python 3.11 or newer, but '$(PYTHON)' is $$($(PYTHON) --version 2>&1). Name another one: make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; exit 2; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) || { \
	  echo "'$(PYTHON) -m venv' failed. On Debian and Ubuntu: apt install python3-venv; then run make again." >&2; rm -rf $(VENV); exit 2; }
	@echo "setting up $(VENV) (once; most of it is torch) ..."
	$(BIN)/python -m pip install -qq --disable-pip-version-check $(TORCH)
	$(BIN)/python -m pip install -qq --disable-pip-version-check -e .
	@touch $@

# What the tests import of it is compiled then; the rest, most of transformers, never.
$(DEV): $(RUN)
	$(BIN)/python -m pip install -qq --disable-pip-version-check --no-compile -e '.[dev]'
	@touch $@
