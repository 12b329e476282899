# Every target works from a fresh clone: it creates .venv, installs what is missing, says what it does, and is cheap to
# repeat. CUDA kernels are built when an nvcc is found; PEFT_KERNELS_CUDA and PEFT_KERNELS_CUDA_ARCHS are in setup.py.
#
#   make test      lint, the tests, then the static checks of the compiled kernels: what CI runs; RECORD=1 keeps how they
#                  ended in benchmarks/results/tests/, for README's table of versions
#   make demo      adapts a small vision-language model by every method; FULL=1: all variants, long
#   make lint      ruff
#   make static    every ahead-of-time compilation, not only CI's choice
#   make races     races in the kernels, looked for in all of the tests' problems and with every barrier left out
#   make kills     a training that saves and exports, killed at 200 random moments: what it leaves is whole
#   make fuzz      10,000 random cases: operations against float64, adapters there and back through files; long
#   make bench     the benchmarks' cases under pytest-benchmark; python -m peft_kernels bench is the one with peers
#   make gpu       on a GPU machine, three runs of nine minutes: PARTS="truth speed tuning" OUT=gpu_out (docs/gpu.md)
#   make gpu-rehearsal  all of make gpu but the numbers, without a GPU: kernels compiled, launches checked; long
#   make peft-suite  PEFT's own tests with its layers fused, and with Aurora as a method of it; 12 minutes on two cores
#   make mutation  MUTANTS=300 SEED=0 JOBS=1: whether tests notice wrong lines (tests/mutation/run.py); hours
#   make tables    docs/measured.md, its pictures and README's line, table and figure from the result files
#   make wheel     dist/*.whl
#   make clean     removes build outputs; distclean also .venv

PYTHON ?= python3
TORCH  ?= torch==2.13.0
TRITON ?= triton==3.7.1
VENV   ?= .venv

# Two workers, one thread each: the interpreted kernels are single-threaded Python. PYTEST_ARGS adds to every pytest call.
PYTEST_WORKERS  ?= 2
OMP_NUM_THREADS ?= 1
PYTEST_ARGS    ?=
RECORD         ?=

OUT   ?= gpu_out
PARTS ?=
SUITE_ARGS ?=
MUTANTS ?= 300
SEED    ?= 0
ONLY    ?=
JOBS    ?= 1

PY := $(VENV)/bin/python
PIP = $(PY) -m pip install -q --no-compile  # half the time: most modules are never imported
NUMPY := $(if $(filter triton==3.6.%,$(TRITON)),"numpy<2.4")# which Triton 3.6's interpreter needs
BUILD_REQUIRES := "setuptools>=77" "pybind11>=2.13" "cmake>=3.25" ninja
CHOICES := $(PYTHON) $(TORCH) $(TRITON)
CUDA_CHOICES := $(PEFT_KERNELS_CUDA) $(PEFT_KERNELS_CUDA_ARCHS) $(CUDACXX) $(CUDA_HOME)
CUDA_SOURCES := $(wildcard CMakeLists.txt csrc/*)

export PIP_DISABLE_PIP_VERSION_CHECK := 1
export PIP_ROOT_USER_ACTION := ignore
export PYTHONDONTWRITEBYTECODE :=  # where it is set, each of the processes that tests start would compile what it imports
# Without a GPU the Triton kernels run in the interpreter; with one, the tests run the real kernels.
HAS_GPU = $(PY) -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'

# Hopper's own instructions need the letter.
CAPABILITY = import torch; c = torch.cuda.get_device_capability(); print(f"{c[0]}{c[1]}" + "a" * (c[0] == 9))

ifneq ($(and $(RECORD),$(PYTEST_ARGS)),)
$(error RECORD=$(RECORD) is for whole runs: leave out PYTEST_ARGS)
endif

.DEFAULT_GOAL := help
.PHONY: help env test lint tests static-ci static races kills fuzz mutation peft-suite demo bench gpu gpu-rehearsal
.PHONY: tables wheel clean distclean FORCE
.DELETE_ON_ERROR:
.NOTPARALLEL:

help:
	@sed -n 's/^#   //p' $(firstword $(MAKEFILE_LIST))

# ---- the environment -----------------------------------------------------------------------------------------------

env: $(VENV)/installed

# Both files are rewritten only when a choice changes: another TORCH starts afresh, another PEFT_KERNELS_CUDA reinstalls.
$(VENV)/choices: FORCE
	@echo '$(CHOICES)' | cmp -s - $@ || { set -e; \
	    echo "== creating $(VENV) with $(PYTHON)"; \
	    $(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "python >= 3.10 is needed: make PYTHON=...")'; \
	    $(PYTHON) -m venv --clear $(VENV); \
	    echo '$(CHOICES)' > $@; }

$(VENV)/cuda-choices: FORCE | $(VENV)/choices
	@echo '$(CUDA_CHOICES)' | cmp -s - $@ || echo '$(CUDA_CHOICES)' > $@

$(VENV)/installed: $(VENV)/choices $(VENV)/cuda-choices pyproject.toml setup.py $(CUDA_SOURCES)
	@echo "== installing $(TORCH) $(TRITON), then peft_kernels, editable; its CUDA kernels compile meanwhile, for minutes"
	$(PIP) $(BUILD_REQUIRES)
	@$(PY) setup.py build_ext >/dev/null 2>&1 & \
	$(PIP) "$(TORCH)" $(if $(TRITON),"$(TRITON)") && PEFT_KERNELS_CUDA=off $(PIP) --no-build-isolation -e ".[test,demo]" $(NUMPY); \
	status=$$?; wait; exit $$status
	$(PY) setup.py -q build_ext --inplace
	$(PY) -m peft_kernels env
	@touch $@

# ---- checks --------------------------------------------------------------------------------------------------------

# $(call timed,COMMAND): and says how long it took, however it ended.
timed = begin=$$(date +%s); $(1); status=$$?; echo "== took $$(($$(date +%s) - begin)) s"; exit $$status

test: lint tests static-ci

lint: $(VENV)/installed
	@echo "== lint"
	$(PY) -m ruff check .

tests: $(VENV)/installed
	@if $(HAS_GPU); then \
	    echo "== tests, on the GPU"; \
	    $(call timed,$(PY) -m pytest tests --ignore=tests/static $(if $(RECORD),--record tests) $(PYTEST_ARGS)); \
	else \
	    echo "== tests, Triton kernels interpreted: about fourteen minutes on two quiet cores"; \
	    $(call timed,TRITON_INTERPRET=1 OMP_NUM_THREADS=$(OMP_NUM_THREADS) $(PY) -m pytest tests --ignore=tests/static \
	        -n $(PYTEST_WORKERS) --dist worksteal --durations=10 --durations-min=5 \
	        $(if $(RECORD),--record tests) $(PYTEST_ARGS)); \
	fi

# Processes of its own: kernels decorated under the interpreter cannot be compiled. A file's tests share what is compiled.
static-ci: $(VENV)/installed
	@echo "== static checks of the compiled kernels"
	@$(call timed,env -u TRITON_INTERPRET OMP_NUM_THREADS=$(OMP_NUM_THREADS) $(PY) -m pytest tests/static \
	    -n $(PYTEST_WORKERS) --dist loadfile $(if $(RECORD),--record static) $(PYTEST_ARGS))

static: $(VENV)/installed
	@echo "== static checks, the full sweep"
	env -u TRITON_INTERPRET $(PY) -m pytest tests/static -m "" $(PYTEST_ARGS)

races: $(VENV)/installed
	@echo "== races, the full sweep"
	TRITON_INTERPRET=1 OMP_NUM_THREADS=1 $(PY) -m pytest tests/test_races*.py -m "" -n $(PYTEST_WORKERS) $(PYTEST_ARGS)

kills: $(VENV)/installed
	@echo "== killed at 200 random moments"
	OMP_NUM_THREADS=1 $(PY) -m pytest tests/test_adapter_crashes.py -m "" -s $(PYTEST_ARGS)

fuzz: $(VENV)/installed
	@echo "== 10,000 random cases"
	TRITON_INTERPRET=1 OMP_NUM_THREADS=1 $(PY) -m pytest tests/test_fuzz.py -m sweep -n $(PYTEST_WORKERS) $(PYTEST_ARGS)

peft-suite: $(VENV)/installed
	@echo "== PEFT's own tests"
	$(PIP) datasets diffusers parameterized scipy
	OMP_NUM_THREADS=1 $(PY) tests/peft_suite/run.py $(SUITE_ARGS)

mutation: $(VENV)/installed
	@echo "== mutants"
	$(PIP) cosmic-ray==8.7.0
	TRITON_INTERPRET=1 OMP_NUM_THREADS=1 TORCHINDUCTOR_COMPILE_THREADS=1 $(PY) tests/mutation/run.py \
	    --mutants $(MUTANTS) --seed $(SEED) --only "$(ONLY)" --jobs $(JOBS)

# ---- what users run ------------------------------------------------------------------------------------------------

demo: $(VENV)/installed
	@echo "== demo"
	$(PY) -m peft_kernels.demo $(if $(FULL),--full)

bench: $(VENV)/installed
	@echo "== benchmarks"
	OMP_NUM_THREADS=1 $(PY) -m pytest benchmarks --benchmark-only --benchmark-group-by=group $(PYTEST_ARGS)

# With the Python that has torch for this GPU, and nothing from a network: no environment is made. Without CUDA's kernels,
# if they do not build, Triton's are still worth the run, which tells that they are missing.
gpu:
	@$(PYTHON) -c 'import sys, torch; sys.exit(None if torch.cuda.is_available() else "no GPU: PYTHON=… can name another Python")'
	@began=$$(date +%s); install="$(PYTHON) -m pip install -q --no-build-isolation --no-deps -e ."; \
	echo "== building for this GPU"; \
	PEFT_KERNELS_CUDA=require PEFT_KERNELS_CUDA_ARCHS=$$($(PYTHON) -c '$(CAPABILITY)') $$install \
	    || { echo "== CUDA's kernels do not build here"; PEFT_KERNELS_CUDA=off $$install; } && \
	$(PYTHON) -m peft_kernels.benchmarks.gpu --out $(OUT) --began $$began $(PARTS)

gpu-rehearsal: $(VENV)/installed
	@echo "== a rehearsal of make gpu"
	$(PY) -m peft_kernels.benchmarks.gpu.rehearsal peft_kernels.benchmarks.gpu --out $(OUT) --seconds 3600 $(PARTS)

tables: $(VENV)/installed
	$(PY) -m peft_kernels.benchmarks.tables

wheel: $(VENV)/installed
	@echo "== building a wheel"
	$(PY) -m pip wheel -q --no-deps --no-build-isolation -w dist .
	@ls -l dist

clean:
	rm -rf build dist *.egg-info peft_kernels/_C.* $(VENV)/installed

distclean: clean
	rm -rf $(VENV)
