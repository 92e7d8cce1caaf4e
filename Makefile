# `make` lists the targets. All of them make the virtual environment they need.

PYTHON ?= python3
VENV ?= .venv
OUT ?= runs/demo
PORT ?= 5000
WORKERS ?= 2
IMAGE ?= svip:latest
TARGET ?= cpu
WHEELS_PORT ?= 8418
GIT_SHA ?= $(shell git describe --always --dirty --abbrev=40 --exclude='*' 2>/dev/null || echo unknown)

BIN := $(VENV)/bin
READY := $(VENV)/.ready

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-quick lint format ui image up down clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(READY)  ## make the virtual environment with the tested versions (VENV=.venv PYTHON=python3)

demo: $(READY)  ## run the whole experiment on synthetic data: minutes on two CPU cores (OUT=runs/demo)
	$(BIN)/svip pipeline run experiment --preset smoke --out "$(OUT)"

test: $(READY)  ## run every test that this machine can run; the others say why they skip (WORKERS=2 processes)
	$(BIN)/python -m pytest -n $(WORKERS) --no-loadscope-reorder

test-quick: $(READY)  ## run the tests that take seconds
	$(BIN)/python -m pytest -m "not slow and not docker"

lint: $(READY)  ## check style, imports, types and the Dockerfile
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/hadolint infra/docker/Dockerfile

format: $(READY)  ## put the code into shape
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

ui: $(READY)  ## show the tracked runs at http://127.0.0.1:5000 (PORT=5000)
	$(BIN)/mlflow ui --backend-store-uri "$${MLFLOW_TRACKING_URI:-sqlite:///$(CURDIR)/mlflow.db}" --port $(PORT)

image:  ## build the image (IMAGE=svip:latest TARGET=cpu|cuda TORCH_INDEX=address WHEELS=folder; docs/docker.md)
	@infra/server.sh engine
	@$(if $(WHEELS),$(PYTHON) -m http.server --bind 127.0.0.1 --directory "$(WHEELS)" $(WHEELS_PORT) >/dev/null 2>&1 & \
	    trap "kill $$!" EXIT;) \
	docker build -f infra/docker/Dockerfile --target $(TARGET) -t $(IMAGE) --build-arg GIT_SHA=$(GIT_SHA) \
	    $(if $(TORCH_INDEX),--build-arg TORCH_INDEX=$(TORCH_INDEX)) \
	    $(if $(WHEELS),--network host --build-arg PIP_FIND_LINKS=http://127.0.0.1:$(WHEELS_PORT)/) $(BUILD_ARGS) .

up:  ## start a team's server in Docker: MLflow, PostgreSQL, an S3 store (settings: infra/.env; docs/server.md)
	@infra/server.sh up

down:  ## stop that server and keep what it holds (VOLUMES=remove: remove that too)
	@infra/server.sh down $(if $(filter remove,$(VOLUMES)),--volumes)

clean:  ## remove the virtual environment and caches; results (runs, mlflow.db, mlruns) stay
	rm -rf "$(VENV)" build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(READY): setup.cfg pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	    echo "svip needs Python 3.11 or newer; '$(PYTHON)' is $$($(PYTHON) --version 2>&1)." \
	         "Name another one: make $(MAKECMDGOALS) PYTHON=python3.12" >&2; exit 1; }
	$(PYTHON) -m venv "$(VENV)"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@
