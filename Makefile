# make test       what CI runs: build, lint, fast tests
# make test-all   the slow tests too, and the numeric ones with the oldest torch (`make test-oldest`)
# make test-peft  PEFT's own tests, as they are and patched, and ours with the oldest PEFT too
# make test-poison  the numeric tests in poisoned, fenced memory, which test-all includes
# make fuzz       random calls for ten minutes: right, or refused; ARGS="--seconds 60 --seed 7"
# make bench      the microbenchmark against the unfused baseline, on whatever this machine has
#
# make evidence   on a machine with a GPU: all of the next four, with every profile of the suite, in
#                 at most 40 minutes; PYTHON=python3 takes the interpreter that has torch there
# make gpu        on a machine with a GPU: tests, sanitizers, timings, DRAM bytes, into OUT
# make publish    what OUT proves, as an entry of bench/results/
# make dispatch   what bench/results/ proves, as the automatic choice's table in the package
# make performance  what bench/results/ proves, as docs/performance.md
# make tune-triton  on a machine with a GPU: the tile plans of the Triton kernels, measured
# make gates      registers and instructions of every CUDA kernel, into docs/kernels.md
#
# PYTHON=/path/to/python takes an interpreter that already has torch (and, for `make test`, pytest, numpy,
# hypothesis and pybind11) and installs nothing into it but this package. Without it, a .venv is made.

TORCH := 2.13.0
VENV := .venv
QUIET := -q --disable-pip-version-check

ifeq ($(PYTHON),)
PY := $(VENV)/bin/python
ENV := $(VENV)/.installed
else
PY := $(PYTHON)
ENV :=
endif

STAMP := build/.installed-$(subst /,_,$(PY))
SOURCES := setup.py pyproject.toml $(shell find csrc -type f)
export HF_HUB_OFFLINE := 1

OUT ?= bench/out/gpu

.PHONY: build test test-all test-oldest test-peft test-poison fuzz lint bench bench-overhead \
  bench-memory bench-kernels bench-gemm bench-backward bench-group bench-decode bench-model bench-finetune \
  bench-training gpu evidence publish dispatch performance tune-triton gates example example-peft clean

build: $(STAMP)

$(VENV)/.installed: requirements-dev.txt constraints.txt
	python3 -m venv $(VENV)
	$(PY) -m pip install $(QUIET) --no-compile -c constraints.txt torch==$(TORCH)
	$(PY) -m pip install $(QUIET) --no-compile -c constraints.txt -r requirements-dev.txt
	touch $@

$(STAMP): $(ENV) $(SOURCES)
	$(PY) -m pip install $(QUIET) --no-build-isolation --no-deps -e .
	mkdir -p build && touch $@

test: build lint
	$(PY) -m pytest -n 2 --dist loadgroup -m "not slow and not gpu"

test-all: build lint
	$(PY) -m pytest -n 2 --dist loadgroup
	$(MAKE) test-oldest

# The library that was built for TORCH, in the oldest torch that the package accepts.
OLDEST_TORCH := 2.11.0
OLDEST := .venv-oldest
NUMERIC := $(addprefix tests/test_,faults_arguments.py faults_shapes.py faults_values.py dropout.py \
  group.py group_arguments.py group_autograd.py kernels.py linear.py lora_linear.py ops.py)

$(OLDEST)/.installed: requirements-dev.txt
	python3 -m venv $(OLDEST)
	$(OLDEST)/bin/python -m pip install $(QUIET) --no-compile torch==$(OLDEST_TORCH) \
	  $$(grep -E '^(hypothesis|ninja|numpy|pybind11|pytest|pytest-xdist|rich|safetensors)==' $<)
	touch $@

test-oldest: build $(OLDEST)/.installed
	PYTHONPATH=. $(OLDEST)/bin/python -m pytest -n 2 -m "not slow and not gpu" -k "not triton" $(NUMERIC)

test-poison: build
	$(PY) tests/poison.py $(ARGS)

OLDEST_PEFT := 0.18.1

$(VENV)/.peft: requirements-peft.txt $(VENV)/.installed
	$(PY) -m pip install $(QUIET) -r requirements-peft.txt
	touch $@

build/peft/$(OLDEST_PEFT):
	$(PY) -m pip install $(QUIET) --no-deps --target $@ peft==$(OLDEST_PEFT)

test-peft: build $(if $(PYTHON),,$(VENV)/.peft) build/peft/$(OLDEST_PEFT)
	PYTHONPATH=build/peft/$(OLDEST_PEFT) $(PY) -m pytest -n 2 tests/test_peft*.py
	$(PY) tests/peft_judge.py $(ARGS)

fuzz: build
	$(PY) tests/fuzz.py $(ARGS)

# Formatters are pinned in .venv; those of another interpreter may disagree with them.
lint: $(ENV)
ifeq ($(PYTHON),)
	$(PY) -m ruff check . && $(PY) -m ruff format --check . && $(PY) -m mypy
	$(VENV)/bin/clang-format --dry-run -Werror $(shell find csrc tests -name '*.h' -o -name '*.cpp' \
	  -o -name '*.inl' -o -name '*.cu' -o -name '*.cuh')
else
	@echo "lint: skipped, its tools are pinned in $(VENV)"
endif

bench: build
	$(PY) -m bench $(ARGS)

bench-overhead: build
	$(PY) -m bench.bench_overhead $(ARGS)

bench-memory: build
	$(PY) -m bench.bench_memory $(ARGS)

bench-kernels: build
	$(PY) -m bench.bench_kernels $(ARGS)

bench-gemm: build
	$(PY) -m bench.bench_gemm $(ARGS)

bench-backward: build
	$(PY) -m bench.bench_backward $(ARGS)

bench-group: build
	$(PY) -m bench.bench_group $(ARGS)

bench-decode: build
	$(PY) -m bench.bench_decode $(ARGS)

bench-model: build
	$(PY) -m bench.bench_model $(ARGS)

bench-finetune: build
	$(PY) -m bench.bench_finetune $(ARGS)

bench-training: build
	$(PY) -m bench.training $(ARGS)

# They build by themselves and without a network, which a machine with a GPU may not have: with the
# interpreter that has torch there.
GPU_PY = $(if $(wildcard $(PY)),$(PY),$(or $(PYTHON),python3))
gpu:
	PYTHON=$(GPU_PY) bash bench/gpu_suite.sh $(OUT) $(ARGS)

evidence:
	$(GPU_PY) -m bench.all_profiles $(OUT) $(ARGS)

publish: build
	$(PY) -m bench.publish $(OUT) $(ARGS)

dispatch: build
	$(PY) -m bench.dispatch $(ARGS)

performance: build
	$(PY) -m bench.performance $(ARGS)

tune-triton: build
	$(PY) -m bench.tune_triton $(ARGS)

gates: build
	$(PY) tests/gates.py --write

example: build
	$(PY) examples/finetune_sentiment.py $(ARGS)

example-peft: build
	$(PY) examples/finetune_headlines.py $(ARGS)

clean:
	rm -rf build dist *.egg-info lora_kernels/*.so
