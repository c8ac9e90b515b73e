# Each target sets up what it needs in $(VENV), and finds it done the next time.
# Needs Python 3.10 or newer with venv, a C++ compiler and, for CUDA kernels, nvcc.

PYTHON ?= python3
VENV ?= .venv
# Installed unless the environment has a torch and torchvision that fit.
TORCH ?= torch==2.11.0 torchvision==0.26.0
# Enough to see a detector find things; with the rest of the demo under three minutes, set-up aside.
SECONDS_OF_TRAINING ?= 110
LINTERS = ruff==0.17.6 mypy==2.4.1 clang-format==22.1.8

RUN = $(VENV)/bin/python
HAS_TORCH = -c 'import torch, torchvision.ops; exit([*map(int, torch.__version__.split(".")[:2])] < [2, 6])' 2>/dev/null
BUILT_FROM = setup.py pyproject.toml roialign_ext/_build.py $(shell find csrc -type f)
C_FILES = $(shell find csrc tests/emulation -name '*.h' -o -name '*.cpp' -o -name '*.cu')

.PHONY: demo test bench gpu-report lint ruff mypy clang-format format setup clean

demo: $(VENV)/built.done $(VENV)/demo.done
	$(RUN) examples/demo.py $(ARGS)
	@echo; echo 'A detector trained for $(SECONDS_OF_TRAINING) seconds; three minutes of examples/train.py find more:'
	$(RUN) examples/train.py --seconds $(SECONDS_OF_TRAINING) --out demo_output

test: $(VENV)/built.done $(VENV)/test.done
	$(RUN) -m pytest $(ARGS)

bench: $(VENV)/built.done $(VENV)/demo.done
	$(RUN) benchmarks/bench_roi_align.py $(ARGS)

gpu-report: $(VENV)/torch.done
	PATH="$(abspath $(VENV))/bin:$$PATH" bash benchmarks/gpu_report.sh --out benchmarks/results/$(shell date +%F)-gpu

lint: ruff mypy clang-format

ruff: $(VENV)/lint.done
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .

mypy: $(VENV)/lint.done
	$(RUN) -m mypy

clang-format: $(VENV)/lint.done
	$(VENV)/bin/clang-format --dry-run --Werror $(C_FILES)

format: $(VENV)/lint.done
	$(RUN) -m ruff check --fix .
	$(RUN) -m ruff format .
	$(VENV)/bin/clang-format -i $(C_FILES)

setup: $(VENV)/torch.done

clean:
	rm -rf $(VENV) build dist *.egg-info roialign_ext/_C.*.so

# A Python that has torch already lends it to the environment; then nothing large is downloaded.
$(VENV)/torch.done:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python 3.10 or newer is needed: make PYTHON=...")'
	test -x $(RUN) || $(PYTHON) -m venv $$($(PYTHON) $(HAS_TORCH) && echo --system-site-packages) $(VENV)
	$(RUN) $(HAS_TORCH) || $(RUN) -m pip install $(TORCH)
	$(RUN) -m pip install setuptools wheel ninja
	touch $@

$(VENV)/built.done: $(VENV)/torch.done $(BUILT_FROM)
	$(RUN) -m pip install --no-build-isolation -e .
	touch $@

# The optional dependencies of that name in pyproject.toml.
$(VENV)/demo.done $(VENV)/test.done: $(VENV)/%.done: pyproject.toml | $(VENV)/built.done
	$(RUN) -m pip install 'roialign_ext[$*]'
	touch $@

$(VENV)/lint.done: $(VENV)/torch.done Makefile
	$(RUN) -m pip install $(LINTERS)
	touch $@
