# make help lists what there is. PYTHON chooses the interpreter, TORCH_INDEX another source of torch, such as
# https://download.pytorch.org/whl/cpu; ARGS goes to the program that is run.
PYTHON ?= python3
ARCH ?= 9.0a
TORCH_INDEX ?=
ARGS ?=
VENV := .venv
PEERS := benchmarks/peers/.venv
TORCHRL := build/torchrl
GPU_BENCHMARKS := $(patsubst %,benchmarks/test_%.py,rel_attention lstm rollouts training_step)
BENCH := -m pytest --benchmark-only --benchmark-columns=median,iqr,rounds
SOURCES := $(shell find csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh' -o -name '*.txt')
CPP := $(filter %.cpp %.h %.cu %.cuh,$(SOURCES)) $(wildcard tests/csrc/* tests/emulator/*.cpp tests/emulator/*.h)
RUN := $(VENV)/bin/python
AT_ONCE := -n auto --dist worksteal
PIP := $(RUN) -m pip install --quiet --constraint constraints.txt $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX))

.PHONY: train test test-slow test-anywhere test-wheels lint wheel bench bench-rollouts bench-peers cuda-check gpu-check \
	gpu-prebuild gpu-build gpu-test gpu-bench gpu-day gpu-sanitize install help clean

# Which preset it takes: built_in_preset in pytbptt/training/config.py.
train: $(VENV)/installed  ## train the default model on the built-in corpus (about 5 minutes on 2 cores)
	$(RUN) -m pytbptt.train $(ARGS)

test: $(VENV)/installed-test  ## run the test suite
	$(RUN) -m pytest $(AT_ONCE) $(ARGS)

test-slow: $(VENV)/installed-test  ## run the tests that are too slow for every time
	$(RUN) -m pytest $(AT_ONCE) -m slow $(ARGS)

test-anywhere: $(VENV)/installed-test  ## the tests as other processors, threads and Pythons run them (half an hour)
	$(RUN) -m tests.checks.platform_matrix $(ARGS)

lint: $(VENV)/installed-lint  ## check format, lint, spelling and types, C++ too
	$(RUN) -m ruff format --check .
	$(RUN) -m ruff check .
	$(VENV)/bin/codespell
	$(VENV)/bin/lint-imports
	for platform in linux darwin win32; do $(RUN) -m mypy --platform $$platform || exit 1; done
	$(VENV)/bin/clang-format --dry-run --Werror $(CPP)
	$(RUN) -c 'import sys; sys.exit("\n".join(f"{path}:{n}: found {len(line) - 1} columns, expected at most 120" for path \
		in sys.argv[1:] for n, line in enumerate(open(path, encoding="utf-8"), 1) if len(line) > 121) or 0)' $(CPP)

bench: $(VENV)/installed-test  ## time the ops, the loader and preparation
	$(RUN) $(BENCH) benchmarks $(ARGS)

bench-rollouts: $(VENV)/installed-test $(TORCHRL)/installed  ## time LSTMs with resets, TorchRL's among the rest
	PYTHONPATH=$(TORCHRL) $(RUN) $(BENCH) benchmarks/test_rollouts.py $(ARGS)

bench-peers: $(VENV)/installed $(PEERS)/installed  ## time whole models beside transformers', in an environment of its own
	$(RUN) -m benchmarks.peers $(ARGS)

wheel: $(VENV)/installed-package  ## dist/: the source distribution, and a CPU wheel that needs no compiler
	rm -rf dist build/dist
	PATH="$(abspath $(VENV))/bin:$$PATH" PYTBPTT_SKIP_CUDA=1 $(RUN) -m build --no-isolation --outdir build/dist .
	PATH="$(abspath $(VENV))/bin:$$PATH" $(RUN) -m auditwheel repair --exclude 'libtorch*.so' --exclude 'libc10*.so' --wheel-dir dist build/dist/*.whl
	mv build/dist/*.tar.gz dist
	$(RUN) -m twine check --strict dist/*

test-wheels: wheel  ## wheels for several Pythons, tried with other releases of torch than they were compiled against
	$(RUN) -m tests.checks.wheels $(ARGS)

cuda-check: $(VENV)/installed-nvdisasm  ## compile every CUDA kernel with nvcc and list registers and spills (needs no GPU)
	$(RUN) -m tests.checks.cuda_build
	$(RUN) -m tests.checks.kernel_stats --check

# The gpu targets install nothing and need no network: PYTHON's own torch, numpy, pytest and pytest-benchmark, nvcc, and
# a GPU.
# make -k continues with what does not need the part that failed; -o gpu-build uses the extension already built.
gpu-check: gpu-test gpu-bench  ## build for the GPU at hand with PYTHON, test on it, and time against what others offer

gpu-prebuild:  ## build for ARCH, such as 9.0a, without its GPU: what gpu-build does where there is one
	FORCE_CUDA=1 TORCH_CUDA_ARCH_LIST="$(ARCH)" $(PYTHON) setup.py build_ext --inplace
	$(PYTHON) -m tests.common.gpu_primitives "$(ARCH)"

gpu-day:  ## tests and benchmarks on a GPU that is there for minutes: ARGS="--minutes 7 --output DIR"
	$(PYTHON) -m benchmarks.gpu_day $(ARGS)

gpu-build:
	@$(PYTHON) -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' || \
		{ echo "make: found no GPU that $(PYTHON)'s torch sees, expected one" >&2; exit 1; }
	FORCE_CUDA=1 $(PYTHON) setup.py build_ext --inplace

gpu-test: gpu-build  ## the tests that need a GPU
	$(PYTHON) -m pytest --noconftest -p tests.common.restart_on_cuda_error -m gpu tests/ops/test_rel_attention_cuda.py \
		tests/ops/test_lstm_cuda.py tests/training/test_graphed_cuda.py tests/training/test_resume_cuda.py \
		tests/training/test_nccl_cuda.py $(ARGS)

gpu-bench: gpu-build  ## time the ops on the GPU, into benchmarks/results/gpu.json
	$(PYTHON) $(BENCH) $(GPU_BENCHMARKS) --device cuda --results benchmarks/results/gpu.json $(ARGS)

gpu-sanitize: gpu-build  ## the smaller GPU tests of both ops under each tool of compute-sanitizer
	for tool in memcheck racecheck synccheck; do \
		compute-sanitizer --tool $$tool --error-exitcode 1 $(PYTHON) -m pytest --noconftest -m gpu \
			tests/ops/test_rel_attention_cuda.py tests/ops/test_lstm_cuda.py \
			-k "empty or (error_within_baseline and 41)" || exit 1; \
	done

install: $(VENV)/installed  ## make the environment alone

clean:  ## remove the environments (data and runs stay)
	rm -rf $(VENV) $(PEERS) pytbptt.egg-info build dist pytbptt/_C*.so pytbptt/_cuda*.so pytbptt/build.json

help:
	@grep -hE '^[a-z-]+:.*  ## ' $(MAKEFILE_LIST) | awk -F ':.*  ## ' '{printf "make %-14s %s\n", $$1, $$2}'

$(VENV)/created:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
		{ echo "make: $(PYTHON) is older than Python 3.10: say which to use, as in make PYTHON=python3.12" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	touch $@

# The extension is built against the torch that is installed here, hence no isolation.
$(VENV)/installed: $(VENV)/created pyproject.toml constraints.txt setup.py build_backend/pytbptt_build.py $(SOURCES)
	$(PIP) torch numpy setuptools wheel ninja
	$(PIP) --no-build-isolation --editable '.[cli]'
	touch $@

# pytbptt itself is there already: this adds what its extra asks for, and builds nothing again.
$(VENV)/installed-test: $(VENV)/installed
	$(PIP) 'pytbptt[test]'
	touch $@

$(VENV)/installed-package: $(VENV)/installed-test
	$(PIP) 'pytbptt[package]'
	touch $@

$(PEERS)/installed: $(VENV)/created benchmarks/peers/requirements.txt
	$(RUN) -m venv $(PEERS)
	$(PEERS)/bin/python -m pip install --quiet $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) \
		--requirement benchmarks/peers/requirements.txt
	touch $@

# Beside what .venv has, without a torch of its own; of the wheels' folders only the packages.
$(TORCHRL)/installed: $(VENV)/installed benchmarks/peers/torchrl.txt
	rm -rf $(TORCHRL)
	$(RUN) -m pip install --quiet --no-deps --target $(TORCHRL) --requirement benchmarks/peers/torchrl.txt
	rm -rf $(TORCHRL)/benchmarks
	touch $@

$(VENV)/installed-nvdisasm: $(VENV)/installed
	$(PIP) nvidia-cuda-nvdisasm
	touch $@

$(VENV)/installed-lint: $(VENV)/installed
	$(PIP) 'pytbptt[lint]'
	touch $@
