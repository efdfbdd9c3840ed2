# The book's commands; `make` alone lists them. Needs git, make and Python 3.11 or newer, nothing else.
.DEFAULT_GOAL := help
.PHONY: help setup report test test-ui bench refresh verify release lab sweep lock clean
unexport PYTHONDONTWRITEBYTECODE
unexport MPLBACKEND
# the first: without .pyc files every kernel compiles torch anew; the second: kernels inherit it and draw no figure

PY    := .venv/bin/python
# uv where it works, else one of our own
UV    := $(shell uv --version >/dev/null 2>&1 && command -v uv || echo build/uv/bin/uv)
# PYTHON=3.12 makes the environment anew with that interpreter; otherwise any environment that is ready serves
STAMP := $(if $(PYTHON),.venv/.ready-$(subst /,_,$(PYTHON)),$(firstword $(wildcard .venv/.ready*) .venv/.ready))
LOCK  := $(UV) pip compile --universal --python-version 3.11 --generate-hashes --no-emit-index-url --no-header --no-annotate
WORKFLOW := workflow/.venv/.ready

help:  ## list the commands
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-9s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: $(STAMP)  ## the locked environment in .venv (PYTHON=3.12 chooses the interpreter)

report: setup  ## execute every notebook at smoke size and build the HTML
	@$(PY) -m lib report

test: setup  ## ruff, the unit tests, and the notebooks against their stored outputs
	$(PY) -m ruff check .
	OMP_NUM_THREADS=1 $(PY) -m pytest -n 2 --dist loadfile --nbval-lax --nbval-current-env tests notebooks

test-ui: setup  ## the book and JupyterLab in headless Chromium
	$(PY) -m pytest -m ui tests

bench: setup  ## train.fit beside a plain PyTorch loop, a table for each work (eight minutes of a quiet machine)
	$(PY) -m benchmarks

refresh: setup  ## renew the outputs that are committed with the notebooks
	@$(PY) -m lib refresh

verify: setup  ## run the recorded smoke runs again and compare their numbers
	@$(PY) -m lib verify $(NAME)

release: setup  ## check that a fresh clone of HEAD gives the committed tables
	@$(PY) -m lib release

lab: setup  ## JupyterLab on this machine, behind its token
	$(PY) -m jupyterlab --ServerApp.ip=127.0.0.1 $(if $(filter 0,$(shell id -u)),--allow-root)

sweep: setup $(if $(filter-out 0,$(DRY)),,$(if $(NAME),$(WORKFLOW)))  ## many runs: NAME=gmm [PRESET=smoke SEEDS= PROFILE= CORES= GPUS= TIMEOUT= AGAIN=1 DRY=1]
	@$(PY) -m lib sweep '$(or $(NAME),--list)' --preset '$(or $(PRESET),smoke)' --profile '$(or $(PROFILE),local)' \
	  $(if $(SEEDS),--seeds '$(SEEDS)') $(if $(CORES),--cores '$(CORES)') $(if $(GPUS),--gpus '$(GPUS)') \
	  $(if $(TIMEOUT),--timeout '$(TIMEOUT)') $(if $(filter-out 0,$(AGAIN)),--again) $(if $(filter-out 0,$(DRY)),--dry-run)

lock: $(UV)  ## resolve both requirements.txt anew from pyproject.toml
	$(LOCK) --group book --group test pyproject.toml -o requirements.txt
	$(LOCK) --group workflow -o workflow/requirements.txt

clean:  ## remove what was built; the environment and the runs stay
	rm -rf build/book _build .pytest_cache .ruff_cache

$(STAMP): requirements.txt pyproject.toml | $(UV)
	@set -e; start=$$(date +%s); rm -f .venv/.ready*; \
	if [ -n "$(PYTHON)" ]; then $(UV) venv -q --clear --python "$(PYTHON)" .venv; \
	elif ! $(PY) -c '' 2>/dev/null; then \
	  $(UV) venv -q --clear --no-python-downloads --python '>=3.11,<3.14' .venv 2>/dev/null || \
	  $(UV) venv -q --clear --python '>=3.11' .venv; fi; \
	$(UV) pip sync -q --python $(PY) --require-hashes requirements.txt; \
	$(UV) pip install -q --python $(PY) --no-deps --no-build-isolation -e .; \
	$(PY) -m lib.offline; touch $@; \
	echo "environment ready in $$(($$(date +%s) - start)) s: $$($(PY) --version)"

$(WORKFLOW): workflow/requirements.txt | $(UV) $(STAMP)
	@$(UV) venv -q --clear --python $(PY) workflow/.venv
	@$(UV) pip sync -q --python workflow/.venv/bin/python --require-hashes workflow/requirements.txt
	@touch $@; echo "Snakemake ready in workflow/.venv"

build/uv/bin/uv:
	@echo "uv is not installed: fetching it into build/uv"
	@python3 -m pip install -q --target build/uv uv || { python3 -m venv build/uv && build/uv/bin/python -m pip install -q uv; } \
	|| { echo "error: cannot fetch uv; install it, or pip for python3" >&2; exit 1; }
