# `make demo` and `make test` need python3 (3.10 or newer, with headers), g++ and make. They set up everything else and
# reuse it: a virtual environment, the dependencies, the compiled extension.
#
#   make test VENV= PYTHON=python3     the ambient interpreter instead; nothing is downloaded or installed
#   make test ARGS='-k varlen -x'      arguments for pytest, the examples or the benchmark
#   make build MAX_JOBS=1              compile with one process
#   make gpu-test LIMIT=120            two minutes of tests on a GPU; the next run resumes there

VENV   ?= .venv
PYTHON ?= python3
TORCH  ?= torch==2.13.0
# For make headers: the oldest, and those that came after 2.13.
TORCHES ?= 2.11.0 2.12.1 2.14.1 2.15.0
ARGS   ?=
CXX    ?= g++

BUILD_TOOLS := 'setuptools>=77.0.3' ninja
# Versions are pinned in one place, for the hooks and for `make lint`.
LINT_TOOLS  := $(sort $(shell grep -oE '[a-z-]+==[0-9.]+' .pre-commit-config.yaml))
# The disassembler of `make report`. It reads the code of every CUDA 13.
REPORT_TOOLS := nvidia-cuda-cuobjdump==13.2.78 nvidia-cuda-nvdisasm==13.2.78

# The projects whose own code tests/integrations runs.
INTEGRATIONS := transformers==5.24.0 accelerate==1.15.0 diffusers==0.42.1 xformers==0.0.35 kernels==0.17.2
# The last release before 5 and what it needs, in a folder of their own, and the tests that it can run.
OLD_TRANSFORMERS := transformers==4.57.6 huggingface-hub==0.36.2 tokenizers==0.22.2 kernels==0.10.5
OLD_TESTS := $(addprefix tests/integrations/test_,generate.py transformers_models.py transformers_training.py)

file_name = $(shell printf '%s' '$(1)' | tr -c 'A-Za-z0-9.' '_')
# The build depends on the interpreter and on the choice of GPUs.
GPU_CHOICE := $(FLASH_ATTN_CUDA_ARCHS)$(TORCH_CUDA_ARCH_LIST)$(FLASH_ATTENTION_SKIP_CUDA_BUILD)
BUILT := build/.built-with-$(call file_name,$(or $(strip $(VENV)),$(PYTHON))$(GPU_CHOICE))
ifeq ($(strip $(VENV)),)
PY           := $(PYTHON)
export PYTHONPATH := $(CURDIR)$(if $(PYTHONPATH),:$(PYTHONPATH))
else
PY           := $(VENV)/bin/python
READY        := $(VENV)/.ready-$(call file_name,$(TORCH))
LINT_READY   := $(VENV)/.lint-$(call file_name,$(LINT_TOOLS))
REPORT_READY := $(VENV)/.report-$(call file_name,$(REPORT_TOOLS))
INTEGRATIONS_READY := $(VENV)/.integrations-$(call file_name,$(INTEGRATIONS))
OLD_READY    := $(VENV)/old-transformers/ready-$(call file_name,$(OLD_TRANSFORMERS))
endif

# Uses pytest-xdist and pytest-timeout of the virtual environment: one process per core, and a limit for hanging tests.
WORKERS = $(shell $(PY) -c 'import pytest_timeout, xdist' 2>/dev/null && \
    echo --numprocesses=auto --maxprocesses=8 --dist=loadgroup --timeout=900)

# GPU machines come with a matching torch: use the ambient interpreter, unless VENV is given.
GPU_VENV := $(if $(filter command environment,$(origin VENV)),$(strip $(VENV)))
GPU_PY   := $(if $(GPU_VENV),$(GPU_VENV)/bin/python,$(PYTHON))
GPU_PATH := PYTHONPATH='$(CURDIR):$(PYTHONPATH)'
# PREBUILT=1: use the extension in flash_attn/, compiled on another machine for this Python and torch.
GPU_BUILD := $(if $(PREBUILT),:,$(MAKE) --no-print-directory build VENV='$(GPU_VENV)')
# Number of test processes: time is spent on making inputs and references, not in kernels.
JOBS  ?= 4
# No test or measurement is started after LIMIT seconds; results go to the folder RESULTS.
export LIMIT RESULTS

# Includes folders, so that a deleted file counts as a change.
SOURCES := setup.py pyproject.toml flash_attn/_version.py $(wildcard build_tools/*.py) \
    $(shell find csrc -type d -o -name '*.h' -o -name '*.inl' -o -name '*.cpp' -o -name '*.cu')
CXX_FILES = $(shell find csrc examples simulator tests -name '*.h' -o -name '*.inl' -o -name '*.cpp' -o -name '*.cu')
# What includes no torch, but for missing.cpp, which compiles with macros of its Makefile only.
TIDY_FILES = $(filter-out %/missing.cpp, $(shell find csrc/cpu csrc/cuda simulator tests -name '*.cpp'))

# Prints what starts and, when the recipe's shell exits, its status and duration.
define step
step='$(1)'; start=$$(date +%s); printf '\n==> %s\n' "$$step"; \
trap 'status=$$?; outcome=done; [ $$status -eq 0 ] || outcome=FAILED; \
    printf "==> %s: %s after %d s\n" "$$step" $$outcome $$(($$(date +%s) - start))' EXIT; set -e
endef
# To be used after ||: prints what is missing, and the remedy.
fail = { echo '$(1)' >&2; exit 1; }

.DEFAULT_GOAL := help
.PHONY: help venv build test test-all integrations demo generate long ladder bench race sanitize mutants report headers \
    gpu-test gpu-bench gpu-first lint format clean distclean

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-12s %s\n", $$1, $$2 }' Makefile

venv: $(READY) ## the virtual environment with torch and what compiling needs

build: $(BUILT) ## compile the extension, in place

test: $(BUILT) ## the tests, long tables sampled
	@$(call step,test); \
	$(PY) -m pytest $(WORKERS) $(ARGS)

test-all: $(BUILT) ## all tests, with every case of long tables
	@$(call step,test-all); \
	$(PY) -m pytest $(WORKERS) --whole $(ARGS)

integrations: $(BUILT) $(INTEGRATIONS_READY) $(OLD_READY) ## tests with the real transformers, which it installs
	@$(call step,integrations); \
	$(PY) -m pytest $(WORKERS) tests/integrations $(ARGS); \
	PYTHONPATH='$(dir $(OLD_READY)):$(PYTHONPATH)' $(PY) -m pytest $(WORKERS) $(OLD_TESTS) $(ARGS)

demo: $(BUILT) ## train a small GPT on real text, measure attention, save the figures
	@$(call step,demo); \
	$(PY) examples/train_gpt.py $(ARGS)

generate: $(BUILT) ## write text with the GPT of the demo, with a KV cache and without
	@$(call step,generate); \
	$(PY) examples/generate.py $(ARGS)

long: $(BUILT) ## train that GPT on 32768 tokens, cut over 1, 2 and 4 processes, and draw the memory of each
	@$(call step,long); \
	for ranks in 1 2 4; do \
	    $(PY) -m torch.distributed.run --standalone --nproc-per-node $$ranks examples/train_long.py $(ARGS); \
	done

ladder: ## from naive attention to a tiled kernel in six steps, on the simulator; needs g++ only
	@$(MAKE) --no-print-directory -f examples/ladder/Makefile

bench: $(BUILT) ## measure speed, decoding, memory and overhead against every attention of torch
	@$(call step,bench); \
	for what in attention decode memory overhead; do $(PY) benchmarks/bench.py $$what $(ARGS); done

gpu-test: ## the tests on this machine's GPU; run again, it goes on; with python3, in no virtual environment
	@$(call step,gpu-test); \
	$(GPU_BUILD); \
	$(GPU_PATH) $(GPU_PY) -m pytest --device=cuda --resume='$(or $(RESULTS),build/gpu-test)' --stop-after=$(or $(LIMIT),330) \
	    --numprocesses=$(JOBS) --max-worker-restart=50 --maxschedchunk=2 --timeout=60 --timeout-method=thread $(ARGS)

gpu-bench: ## measure the CUDA kernels on this machine's GPU against every attention of torch, for LIMIT seconds
	@$(call step,gpu-bench); \
	$(GPU_BUILD); \
	$(GPU_PATH) $(GPU_PY) benchmarks/bench.py --device=cuda $(ARGS)

gpu-first: ## a first look at a GPU within LIMIT seconds (560), the most telling first; REHEARSE=1 without a GPU
	@$(call step,gpu-first); export START=$$(date +%s); \
	$(GPU_BUILD); \
	$(GPU_PATH) $(GPU_PY) -m tools.gpu_first $(if $(REHEARSE),--rehearse)

race: ## the CUDA kernels on the simulator, under ThreadSanitizer; SAMPLE=30 for some of the cases
	@$(call step,race); \
	$(MAKE) -f tests/kernels/Makefile -j$$(nproc) primitives-tsan misuse-tsan race

sanitize: ## the CUDA kernels on the simulator, under AddressSanitizer and UBSan; SAMPLE=30 for some of the cases
	@$(call step,sanitize); \
	$(MAKE) -f tests/kernels/Makefile -j$$(nproc) primitives-asan misuse-asan sanitize

mutants: ## break one line of the CUDA kernels at a time: does a case detect it? ARGS='--sample 40' for some
	@$(call step,mutants); \
	$(MAKE) -f tests/kernels/Makefile -j$$(nproc) mutants

report: $(REPORT_READY) ## compile the CUDA kernels, and report on them from the compiler's output and the machine code
	@$(call step,report); \
	$(PY) -m tools.kernel_report $(ARGS)

headers: $(READY) ## check the sources with the headers of other torches, generating no code
	@$(call step,headers); \
	$(PY) -m tools.torch_headers $(TORCHES)

lint: $(LINT_READY) ## ruff, mypy, clang-format, clang-tidy and shellcheck, changing nothing
	@$(call step,lint); failed=0; \
	scripts=$$($(PY) -c 'import sysconfig; print(sysconfig.get_path("scripts"))'); \
	$(PY) -m ruff check . || failed=1; \
	$(PY) -m ruff format --check . || failed=1; \
	$(PY) -m mypy || failed=1; \
	"$$scripts/clang-format" --dry-run --Werror $(CXX_FILES) || failed=1; \
	printf '%s\n' $(TIDY_FILES) | xargs -P "$$(nproc)" -I {} \
	    "$$scripts/clang-tidy" --quiet {} -- -std=c++20 -Isimulator -Itests/kernels -Icsrc || failed=1; \
	"$$scripts/shellcheck" .ci/run || failed=1; \
	exit $$failed

format: $(LINT_READY) ## rewrite the sources the way that lint wants them
	@$(call step,format); \
	scripts=$$($(PY) -c 'import sysconfig; print(sysconfig.get_path("scripts"))'); \
	$(PY) -m ruff check --fix .; \
	$(PY) -m ruff format .; \
	"$$scripts/clang-format" -i $(CXX_FILES)

clean: ## remove what was built; the virtual environment stays
	rm -rf build dist compile_commands.json *.egg-info flash_attn/*.so .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find flash_attn tests examples benchmarks build_tools tools -name __pycache__ -prune -exec rm -rf {} +

distclean: clean ## remove .venv as well
	rm -rf .venv

$(READY):
	@$(call step,virtual environment $(VENV)); \
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	    $(call fail,$(PYTHON): Python 3.10 or newer is needed; choose one with PYTHON=...); \
	$(PYTHON) -m venv $(VENV) || \
	    $(call fail,$(PYTHON) makes no virtual environment: on Debian and Ubuntu run apt-get install python3-venv); \
	pip="$(PY) -m pip install --disable-pip-version-check"; \
	$$pip '$(TORCH)' $(BUILD_TOOLS); \
	rm -f $(VENV)/.ready-*; \
	touch $@

$(LINT_READY): $(READY)
	@$(call step,lint tools); \
	$(PY) -m pip install --disable-pip-version-check --quiet $(LINT_TOOLS); \
	rm -f $(VENV)/.lint-*; \
	touch $@

$(INTEGRATIONS_READY): $(READY)
	@$(call step,projects that use flash_attn); \
	$(PY) -m pip install --disable-pip-version-check --quiet $(INTEGRATIONS); \
	rm -f $(VENV)/.integrations-*; \
	touch $@

$(OLD_READY): $(INTEGRATIONS_READY)
	@$(call step,an older transformers); \
	rm -rf $(@D); \
	$(PY) -m pip install --disable-pip-version-check --quiet --no-deps --target $(@D) $(OLD_TRANSFORMERS); \
	touch $@

$(REPORT_READY): $(READY)
	@$(call step,report tools); \
	$(PY) -m pip install --disable-pip-version-check --quiet $(REPORT_TOOLS); \
	rm -f $(VENV)/.report-*; \
	touch $@

# setup.py compiles into build/, where only changes are recompiled, and copies the extension next to the Python files.
# The virtual environment finds this folder through a .pth file, the ambient interpreter through PYTHONPATH; both find the
# metadata in flash_attn.egg-info.
$(BUILT): $(SOURCES) $(READY)
	@$(call step,build); \
	command -v $(CXX) >/dev/null || \
	    $(call fail,$(CXX): no such compiler; on Debian and Ubuntu run apt-get install g++); \
	test -e "$$($(PY) -c 'import sysconfig; print(sysconfig.get_path("include"))')/Python.h" || \
	    $(call fail,$(PY): no Python.h; on Debian and Ubuntu run apt-get install python3-dev); \
	mkdir -p build; \
	rm -f build/.built-with-*; \
	$(PY) setup.py build_ext --inplace; \
	$(PY) setup.py --quiet egg_info; \
	$(if $(VENV),$(register)) \
	touch $@

# The dependencies of the package and its extras, and the package itself.
define register
grep -v '^\[' flash_attn.egg-info/requires.txt >build/requirements.txt; \
$(PY) -m pip install --disable-pip-version-check --quiet --requirement build/requirements.txt; \
echo '$(CURDIR)' >"$$($(PY) -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/flash_attn_checkout.pth";
endef
