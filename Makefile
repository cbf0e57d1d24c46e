# Every target makes or updates .venv by itself; nothing but Python 3.11+, make and the package registries is needed.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
ONLY ?=
LIMIT := 15000

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

lines:
	@for folder in common client server .; do \
	  files=$$(git ls-files --cached --others --exclude-standard "$$folder" | grep '\.py$$' | grep -v '_pb2' | grep -v '^tests/'); \
	  if [ $$folder = . ]; then label=total; else label=$$folder; fi; \
	  count=$$(cat $$files | wc -l); printf '%-8s %6d lines\n' $$label $$count; \
	  if [ $$count -ge $(LIMIT) ]; then echo "more than $(LIMIT) lines without tests"; exit 1; fi; \
	done

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(STAMP)
	$(BIN)/python -m tests.bench $(ONLY)

faults: $(STAMP)
	$(BIN)/python -m tests.faults $(ARGS)

stubs: $(STAMP)
	$(BIN)/python -m grpc_tools.protoc -I. --python_out=. --grpc_python_out=. --pyi_out=. common/link.proto
