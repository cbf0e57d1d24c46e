# Every target makes or updates .venv by itself; nothing but Python 3.11+, make and the package registries is needed.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
ONLY ?=

.PHONY: demo test lint format bench faults stubs lines

$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	touch $(STAMP)

demo: $(STAMP)
	$(BIN)/wardround demo $(ARGS)

test: lint
	$(BIN)/python -m pytest $(ARGS)

lint: $(STAMP) lines
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/pyright
	$(BIN)/lint-imports

lines: $(STAMP)
	$(BIN)/python -m tests.size

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(STAMP)
	$(BIN)/python -m tests.bench $(ONLY)

faults: $(STAMP)
	$(BIN)/python -m tests.faults $(ARGS)

stubs: $(STAMP)
	$(BIN)/python -m grpc_tools.protoc -I. --python_out=. --grpc_python_out=. --pyi_out=. common/link.proto
