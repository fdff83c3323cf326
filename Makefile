# Two commands do everything on a fresh machine: `make demo` and `make test`.
# Python >= 3.12 is found by itself; to choose one: make PYTHON=/path/to/python3.12 ...

.PHONY: demo quick test check gpu-check soak accuracy evidence lint reference figures wheel env env-bridge clean
BIN := .venv/bin
OVERLAYS := $(addprefix .venv/overlays/megatron-core-,$(shell cat tests/old-megatron.txt))
BRIDGE := .venv/overlays/megatron-bridge-$(shell sed -n 's/^megatron-bridge==//p' tests/megatron-bridge.txt)
export PYTHON

demo: env
	$(BIN)/megatron-tokscale demo --out demo-run

quick: env
	$(BIN)/megatron-tokscale demo --quick --out demo-run-quick

# Before each commit: the lint, and the quick tests that start no Megatron job.
IN_PARALLEL := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal
check: lint
	$(IN_PARALLEL) -m "not megatron and not slow"

# All tests that start no job, and then the jobs, of two files at a time: the tests of a file share a
# warm launcher and jobs. The jobs run even if a test before them fails; the exit code is then 1.
test: env
	$(IN_PARALLEL) -m "not megatron"; code=$$?; $(IN_PARALLEL) --dist loadfile -m megatron && exit $$code

# On a machine with a GPU; PYTHON then has torch and the rest, and no .venv is made.
gpu-check:
	$(if $(PYTHON),$(PYTHON),python3) tools/gpu_check --out gpu-check-run/table.md

soak: env
	PYTHONPATH=tests/support $(BIN)/python tools/soak.py --kills 100 --folder soak-run

accuracy: env
	PYTHONPATH=tests/support $(BIN)/python benchmarks/fit_accuracy.py --out benchmarks/results/fit_accuracy.md

evidence: env
	PYTHONPATH=tests/support $(BIN)/python benchmarks/evidence.py --folder evidence-run --out benchmarks/results/evidence.md
	PYTHONPATH=tests/support $(BIN)/python benchmarks/coverage.py --folder coverage-run --out benchmarks/results/coverage.md

lint: env
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# The generated pages of docs/reference.
reference: env
	PYTHONWARNINGS=ignore $(BIN)/python tools/reference.py

# The picture of the README, from the run of `make demo`.
figures: env
	$(BIN)/python tools/figures.py

# The wheel into dist/, tried in a new environment.
wheel:
	tools/try_wheel

env: .venv/ready $(OVERLAYS)

.venv/ready: pyproject.toml constraints.txt
	@python=$$(tools/find-python) && echo "making .venv with $$python (5 GB with torch, some minutes)" \
		&& "$$python" -m venv .venv
	$(BIN)/python -m pip install --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	@touch $@

# Older Megatrons over the same torch: the tests put one of these folders first on PYTHONPATH.
.venv/overlays/megatron-core-%: | .venv/ready
	@rm -rf $@.part
	$(BIN)/python -m pip install --disable-pip-version-check --quiet --no-deps --target $@.part \
		megatron-core==$*
	@mv $@.part $@

# Megatron-Bridge and its packages, in a folder of their own (300 MB): without it the tests of its loop
# are skipped.
env-bridge: env $(BRIDGE)

.venv/overlays/megatron-bridge-%: tests/megatron-bridge.txt | .venv/ready
	@rm -rf $@ $@.part
	$(BIN)/python -m pip install --disable-pip-version-check --quiet --no-deps --target $@.part \
		--requirement tests/megatron-bridge.txt
	@mv $@.part $@

clean:
	rm -rf .venv dist demo-run demo-run-quick gpu-check-run soak-run evidence-run axes-run study-run
