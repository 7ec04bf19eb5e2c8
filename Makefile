SHELL := bash
.SHELLFLAGS := -eu -o pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help
MAKEFLAGS += --no-builtin-rules

PROFILE ?= quick
BENCH ?= runs/bench.json
VENV ?= .venv
TORCH ?= $(or $(shell cat $(VENV)/.complete 2>/dev/null),default)
PY := $(VENV)/bin/python

# One thread per process: the sweep fills the machine with processes, and sums come out in one order.
export OMP_NUM_THREADS := 1
export MKL_NUM_THREADS := 1
export OPENBLAS_NUM_THREADS := 1

# Tests, stored notebooks and the quick profile see one instruction set (PyTorch warns of one the machine lacks: hence
# a file per architecture), and no GPU.
PINNED := env $(shell cat scripts/pinned.env scripts/pinned-$(shell uname -m).env 2>/dev/null)
NBVAL := --nbval --nbval-current-env --nbval-cell-timeout 600 --nbval-sanitize-with tests/nbval_sanitize.cfg
# A process per core, each given whole files: a fixture of a file is then made once, and a notebook has one kernel.
PARALLEL := -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder
STRIP := --keep-output --keep-count \
	--extra-keys "metadata.papermill metadata.language_info cell.metadata.papermill cell.metadata.execution"

.PHONY: help
help: ## list the targets
	@echo "usage: make TARGET [PROFILE=quick|gpu|paper] [TORCH=default|cpu] [PYTHON=python3.12] [VENV=.venv]"
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  %-15s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

.PHONY: env
env: $(VENV)/.complete ## set up .venv from requirements.lock (TORCH=cpu: CPU wheels of torch)

$(VENV)/.complete: requirements.lock pyproject.toml
	@VENV=$(VENV) TORCH=$(TORCH) PYTHON=$(PYTHON) bash scripts/make_env.sh

ifneq ($(TORCH),$(shell cat $(VENV)/.complete 2>/dev/null))
$(VENV)/.complete: another-torch
.PHONY: another-torch
another-torch:
endif

.PHONY: reproduce
reproduce: env ## train, run the notebooks, build the book, compare with the committed records (PROFILE=quick TUNING=)
	@$(PY) scripts/reproduce.py --profile $(PROFILE) $(if $(TUNING),--tuning)

.PHONY: test
test: env ## all tests: units, the stored notebooks (nbval), the book
	$(PINNED) $(PY) -m pytest $(PARALLEL) $(NBVAL) tests notebooks

.PHONY: test-notebooks
test-notebooks: env ## only the stored notebooks: run each cell and compare with its stored output
	$(PINNED) $(PY) -m pytest $(PARALLEL) $(NBVAL) notebooks

.PHONY: book
book: env ## build the book from the committed records and notebooks, into book/_build/html
	@$(PY) book/build.py --notebooks notebooks --profile quick --store results --out book/_build

.PHONY: check-book
check-book: book ## open every page of the built book in headless Chromium: no foreign request, no console error
	@$(PY) book/check_browser.py book/_build/html

.PHONY: serve
serve: ## serve the built book on http://127.0.0.1:8000 (from file:// it opens too, but searches titles only)
	@test -f book/_build/html/index.html || { echo "no book in book/_build/html: run 'make book' first" >&2; exit 2; }
	@$(PY) -m http.server --bind 127.0.0.1 --directory book/_build/html 8000

.PHONY: bench
bench: env ## time the optimisers beside SGD and pytorch_optimizer, in half an hour (BENCH=runs/bench.json)
	@$(PY) -m samlib bench --json $(BENCH)

.PHONY: refresh
refresh: env ## re-execute the stored notebooks from the committed records, and the findings table of README.md
	@rm -rf runs/.refresh
	$(PINNED) $(PY) notebooks/execute.py --out runs/.refresh --workers 2
	$(VENV)/bin/nbstripout $(STRIP) runs/.refresh/*.ipynb
	mv runs/.refresh/*.ipynb notebooks/
	$(PINNED) $(PY) book/findings.py README.md

.PHONY: lint
lint: env ## ruff: style of the code and of the notebooks
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ruff format --check --line-length 84 --config 'format.exclude=[]' notebooks/*.ipynb

.PHONY: lock
lock: ## resolve requirements.lock anew from pyproject.toml (needs uv); pins that still fit are kept
	@command -v uv >/dev/null || { echo "make lock needs uv: https://docs.astral.sh/uv" >&2; exit 2; }
	uv pip compile --quiet --universal --all-extras pyproject.toml -o requirements.lock --custom-compile-command "make lock"

.PHONY: clean
clean: ## forget the runs of PROFILE and the built book; the environment and the committed records stay
	@[[ "$(PROFILE)" =~ ^[a-z]+$$ ]] || { echo "PROFILE='$(PROFILE)' names no profile: quick, gpu or paper" >&2; exit 2; }
	rm -rf runs/$(PROFILE) runs/.refresh book/_build
