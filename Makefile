# Every target makes or updates .venv by itself; nothing but Python 3.11+, make and the package registries is needed.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
ONLY ?=
JOBS ?= 2
# Tests of whole federations: each has the machine to itself, for what they hold has to happen in time.
WHOLE := tests/end_to_end tests/faults tests/test_readme.py

.PHONY: demo test lint format bench faults fuzz mutants stubs lines

$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	touch $(STAMP)

demo: $(STAMP)
	$(BIN)/wardround demo $(ARGS)

test: lint
	$(BIN)/python -m pytest --numprocesses $(JOBS) --dist loadfile $(addprefix --ignore=,$(WHOLE)) $(ARGS)
	$(BIN)/python -m pytest $(WHOLE) $(ARGS)

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

# TenSEAL is only compared with: installed by ``make bench`` alone, and left out where it has no wheel.
bench: $(STAMP)
	-$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[bench]'
	$(BIN)/python -m tests.bench $(ONLY)

faults: $(STAMP)
	$(BIN)/python -m tests.faults $(ARGS)

# The fuzzer is large and nothing else needs it: installed by the first ``make fuzz`` alone.
fuzz: $(STAMP)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[fuzz]'
	$(BIN)/python -m tests.fuzz $(ARGS)

# Nothing else needs cosmic-ray: installed by the first ``make mutants`` alone. It changes a copy of the tree.
mutants: $(STAMP)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[mutants]'
	$(BIN)/python -m tests.mutants $(ARGS)

stubs: $(STAMP)
	$(BIN)/python -m grpc_tools.protoc -I. --python_out=. --grpc_python_out=. --pyi_out=. common/link.proto
