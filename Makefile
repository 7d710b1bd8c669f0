.PHONY: setup demo test test-quick learn bench lint fmt

VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin
TARGET ?= results/tiny/rlhf
# Where there is no GPU the CPU build of torch will do: a tenth of the download.
CPU_TORCH := $(shell command -v nvidia-smi >/dev/null 2>&1 || echo yes)

setup: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml envs/constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(if $(CPU_TORCH),PIP=$(BIN)/pip bash envs/install_cpu_torch.sh)
	$(BIN)/python -m pip install --quiet -c envs/constraints.txt -e '.[test]'
	touch $@

demo: setup
	$(BIN)/snakemake $(TARGET)/actor $(TARGET)/eval $(TARGET)/curves.png
	@cat $(TARGET)/eval/table.txt
	@echo "curves: $(TARGET)/curves.png   talk to it: $(BIN)/python scripts/chat.py $(TARGET)/actor"

test: setup
	PATH=$(abspath $(BIN)):$$PATH $(BIN)/python tests/run_layers.py unit math workflow e2e

test-quick: setup
	$(BIN)/python tests/run_layers.py unit math

learn: setup
	PATH=$(abspath $(BIN)):$$PATH $(BIN)/python tests/learn/learn.py

bench: setup
	PATH=$(abspath $(BIN)):$$PATH $(BIN)/python scripts/launch.py --log logs/bench.log tests/bench/packing.py
	PATH=$(abspath $(BIN)):$$PATH $(BIN)/python tests/bench/memory.py

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/snakefmt --check Snakefile rules
	$(BIN)/mypy
	$(BIN)/snakemake --lint

fmt: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/snakefmt Snakefile rules
