# Every target makes the environment first; `make` alone lists them. Works with GNU make 3.81.

ifeq ($(origin PYTHON),undefined)
PYTHON := $(shell for p in python3.12 python3.11 python3.13 python3; do \
	"$$p" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' >/dev/null 2>&1 && { echo "$$p"; break; }; done)
endif
BIN := .venv/bin
DATA ?=
MAPPING ?=
WORKERS ?= 2

.DEFAULT_GOAL := help
.PHONY: help env tools demo test test-production lint up lock proto clean

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-15s %s\n", $$1, $$2 }' Makefile

env:
	@test -n "$(PYTHON)" || { echo "recsys needs Python 3.11, 3.12 or 3.13, and none is on PATH:" \
		"install one (Debian: apt-get install python3 python3-venv; macOS: brew install python@3.13)" \
		"or name it: make PYTHON=/path/to/python3.12 ..." >&2; exit 1; }
	@"$(PYTHON)" -I recsys_cli/environment.py

tools: env
	@$(BIN)/recsys doctor >/dev/null

demo: tools ## clickstream to answers, on made-up data or on yours: make demo DATA=<file or folder> MAPPING=<name>
	@$(BIN)/recsys demo $(if $(DATA),--data "$(DATA)") $(if $(MAPPING),--mapping "$(MAPPING)")

test: lint tools ## lint, types, room rules and all tests with real parts
	@JAVA_HOME="$$($(BIN)/python -m recsys_cli.java)" && export JAVA_HOME && $(BIN)/pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder

test-production: tools ## what production runs on: brokers, Redis, Spark, an object store, Kubernetes; killed and frozen
	@JAVA_HOME="$$($(BIN)/python -m recsys_cli.java)" && export JAVA_HOME && $(BIN)/pytest tests/production -n $(WORKERS) --dist loadfile --no-loadscope-reorder

lint: env ## lint, types and room rules
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports

up: tools ## the local stack: web UI, daemon, Redis, broker, serving; until Ctrl-C
	@$(BIN)/recsys up

lock: env ## resolve pyproject.toml anew and write requirements.lock
	@"$(PYTHON)" -I recsys_cli/environment.py lock

proto: env ## the Python code of serving/*.proto
	@$(BIN)/python -m grpc_tools.protoc -I . --python_out=. --pyi_out=. --grpc_python_out=. serving/recsys.proto
	@$(BIN)/python -m grpc_tools.protoc -I . --python_out=. --pyi_out=. serving/tfserving.proto

clean: ## remove the environment and all caches (not .recsys, which holds data)
	rm -rf .venv build dist recsys.egg-info .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
