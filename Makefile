# make demo: fine-tune a real language model and see the difference.  make test: lint, types, all tests (9 to 12 minutes on 2 cores).
# make check: lint, types, and the tests that need no real model, no other process, no torch.compile and no simulator (3 minutes).
# Both work on a bare machine: they make .venv, install what they need and build the native kernels (setup.py says which
# environment variables choose what is built; after changing one, make clean).
# make test-versions: what touches PEFT, under the oldest versions of PEFT and transformers that are supported.
# make test-peft: PEFT's own behaviour tests, with ID-LoRA in the place of the methods they list (5 to 10 minutes).
# make test-fallback: all tests without the native module, and with one built without CUDA (20 to 30 minutes).

PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check
PYTEST := -m pytest --numprocesses auto --dist loadfile --no-loadscope-reorder
QUICK := not real_model and not subprocess and not compiled and not simulator
VERSIONS_TESTS := tests/tuner/test_tuner.py tests/tuner/test_failures.py tests/tuner/test_mixed_batches.py tests/lifecycle/test_checkpoint.py tests/tools/test_cli.py tests/tools/test_finetune.py \
	$(addprefix tests/peft/test_,versions.py trainer.py behaviours.py configuration.py refusals.py)

.PHONY: demo check test test-versions test-peft test-fallback lint types unit bench clean

demo: $(INSTALLED)
	$(BIN)/python examples/demo.py $(DEMO_ARGS)

check: lint types
	$(BIN)/python $(PYTEST) -m "$(QUICK)" $(PYTEST_ARGS)

test: lint types unit

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(INSTALLED)
	$(BIN)/mypy

unit: $(INSTALLED)
	$(BIN)/python $(PYTEST) $(PYTEST_ARGS)

# A throw-away environment that holds the two packages, and takes all others from $(VENV).
test-versions: $(INSTALLED)
	rm -rf build/oldest
	$(BIN)/python -m venv build/oldest
	$(BIN)/python -c "import site; print('import site; site.addsitedir(%r)' % site.getsitepackages()[0])" \
		> $$(build/oldest/bin/python -c "import site; print(site.getsitepackages()[0])")/others.pth
	build/oldest/bin/python -m pip install --quiet --disable-pip-version-check --no-deps \
		$$($(BIN)/python -c "from idlora_ext.tested_versions import oldest; print(*oldest())")
	build/oldest/bin/python $(PYTEST) $(VERSIONS_TESTS)

test-peft: $(INSTALLED)
	$(BIN)/python tests/peft/own/run.py $(PYTEST_ARGS)

test-fallback: $(INSTALLED)
	IDLORA_NATIVE=0 $(BIN)/python $(PYTEST) $(PYTEST_ARGS)
	rm -rf build/without-cuda
	IDLORA_CUDA=OFF $(PIP) --no-build-isolation --no-deps --target build/without-cuda .
	PYTHONPATH=$(CURDIR)/build/without-cuda $(BIN)/python -P $(PYTEST) -o "pythonpath=build/without-cuda . benchmarks examples" $(PYTEST_ARGS)

bench: $(INSTALLED)
	for script in benchmarks/bench_*.py; do $(BIN)/python $$script || exit 1; done

$(INSTALLED): pyproject.toml setup.py $(shell find csrc -type f)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) "$(TORCH)" "setuptools>=77" "pybind11>=2.13" "ninja>=1.11"
	$(PIP) --no-build-isolation --editable ".[dev]"
	$(BIN)/idlora env
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info idlora_ext/*.so idlora_ext/not_built.txt .pytest_cache .mypy_cache .ruff_cache
