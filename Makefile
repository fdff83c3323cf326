# Two commands do everything on a fresh machine: `make demo` and `make test`.
# Python >= 3.12 is found by itself; to choose one: make PYTHON=/path/to/python3.12 ...

.PHONY: demo quick test lint env clean
BIN := .venv/bin
export PYTHON

demo: env
	$(BIN)/megatron-tokscale demo --out demo-run

quick: env
	$(BIN)/megatron-tokscale demo --quick --out demo-run-quick

test: env
	$(BIN)/python -m pytest

lint: env
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

env: .venv/ready

.venv/ready: pyproject.toml constraints.txt
	@python=$$(tools/find-python) && echo "making .venv with $$python (5 GB with torch, some minutes)" \
		&& "$$python" -m venv .venv
	$(BIN)/python -m pip install --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	@touch $@

clean:
	rm -rf .venv demo-run demo-run-quick
