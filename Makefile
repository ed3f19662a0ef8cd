# Every target sets up what it needs: a virtual environment with the tested versions and the native build.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin
READY := .venv/.ready

.PHONY: demo test test-slow docs gpu bench lint format clean

demo: $(READY)
	$(BIN)/halo run demo

test: lint
	$(BIN)/pytest -m "not slow and not gpu"

test-slow: $(READY)
	$(BIN)/pytest -m "slow and not gpu"

# The site in build/site, strictly, and notebooks of the tutorials in build/notebooks.
docs: $(READY)
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet
	$(BIN)/python -m tools.pages --notebooks build/notebooks

# Needs torch and triton alone: these files import nothing of what training does.
GPU_TESTS := $(addprefix tests/,kernels/test_gpu.py kernels/test_parity.py kernels/test_kernels.py loss/test_ops.py)

gpu: $(READY)
	$(BIN)/pytest $(GPU_TESTS) -s
	$(BIN)/python -m benchmarks.device_check
	$(BIN)/python -m benchmarks.tune --latents cogvideox wan

# BENCH="--benchmark-compare --benchmark-compare-fail=median:15%" compares with the last saved run, of any revision
bench: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/pytest benchmarks -m "not slow" --benchmark-storage=benchmarks/results/history \
		--benchmark-autosave --benchmark-json=benchmarks/results/bench.json $(BENCH)
	$(BIN)/python -m benchmarks.plot --table benchmarks/results/bench.json --output benchmarks/results/pictures

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf .venv build dist .mypy_cache .pytest_cache .ruff_cache

.venv/bin/python:
	$(PYTHON) -m venv .venv

# The build tools come first and pinned, so that the build needs no unpinned environment of its own;
# torch built for CUDA brings the triton that it was made for.
$(READY): pyproject.toml constraints.txt CMakeLists.txt $(wildcard kernels/*.cpp) | .venv/bin/python
	$(BIN)/python -m pip install --quiet -c constraints.txt torch scikit-build-core cmake ninja
	$(BIN)/python -m pip show --quiet triton || $(BIN)/python -m pip install --quiet triton==3.9.0
	$(BIN)/python -m pip install --quiet -c constraints.txt --no-build-isolation -e ".[train,reward,teacher,quant,docs,dev]"
	touch $@
