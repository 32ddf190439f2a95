# `make demo` and `make test` are all there is to know; both install what they need into .venv.
PYTHON ?= python3.11
# Where pip also looks for torch's CPU build, if its default index has only the CUDA one.
export TORCH_INDEX ?=
# Passed on to the demo: concurrent streams, tokens a stream runs to, window W in tokens.
CLIENTS ?=
TOKENS ?=
WINDOW ?=
# Passed on to the server, as `vllm serve` takes them.
ARGS ?=

BIN := .venv/bin
LOCKS := $(addprefix requirements/,bootstrap.lock debian.lock python.lock torch.lock)
# A process a core; tests/scheduling.py says which tests stay together.
PARALLEL := -n auto
# The GPU kernel, and what is built on it, in Triton's interpreter.
INTERPRETED := tests/attention $(addprefix tests/,benchmarks/test_attention.py engine/test_triton.py \
	plugin/test_backend.py)
COMPILE = $(BIN)/uv pip compile -q --upgrade --python-version 3.11 --generate-hashes \
	--no-annotate --custom-compile-command 'make lock'

.PHONY: install venvs demo ray-demo serve check test test-fast gpu-check lock clean

install: .venv/.installed

.venv/.installed: $(LOCKS) pyproject.toml requirements/install
	PYTHON=$(PYTHON) TORCH_INDEX=$(TORCH_INDEX) requirements/install
	@touch $@

# What does not fit into .venv: peers, the load generator, clients, Triton; and a text, and Redis.
venvs: install
	$(BIN)/python -m benchmarks.harness.venvs \
		$(notdir $(basename $(wildcard requirements/venvs/*.in)))
	$(BIN)/python -m benchmarks.texts.novels
	$(BIN)/python -m benchmarks.harness.redis

demo: install
	$(BIN)/python -m launch.demo \
		$(if $(CLIENTS),--clients $(CLIENTS)) $(if $(TOKENS),--tokens $(TOKENS)) \
		$(if $(WINDOW),--window $(WINDOW))

# Two replicas on this machine, one of which is killed.
ray-demo: install
	$(BIN)/python -m launch.ray_demo

serve: install
	$(BIN)/python -m vllm_sink.serve $(ARGS)

check: install
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

test: install venvs
	$(BIN)/pytest $(PARALLEL)
	TRITON_INTERPRET=1 $(BIN)/pytest $(PARALLEL) -k triton $(INTERPRETED)

test-fast: install venvs
	$(BIN)/pytest $(PARALLEL) -m 'not slow'

# On a machine with an NVIDIA GPU; it brings .venv-gpu itself. QUICK=1: what ten minutes allow, and the
# next call goes on from there.
gpu-check:
	$(if $(shell command -v $(PYTHON)),$(PYTHON),python3) -m launch.gpu_check $(if $(QUICK),--quick)

.venv-gpu/.installed: requirements/gpu.lock pyproject.toml requirements/install
	PYTHON=$(PYTHON) requirements/install gpu
	@touch $@

# Resolves anew, to the newest versions that fit; `make install` then brings .venv up to the result.
lock: install
	$(COMPILE) requirements/bootstrap.in -o requirements/bootstrap.lock
	$(COMPILE) pyproject.toml --extra dev --extra cpu requirements/lock.in \
		--excludes requirements/excluded.in --excludes requirements/cpu_excluded.in \
		--excludes requirements/lock_excluded.in -o requirements/python.lock
	$(COMPILE) pyproject.toml --extra dev --extra gpu requirements/gpu.in \
		--excludes requirements/excluded.in --python-platform x86_64-manylinux_2_31 \
		--only-binary :all: -o requirements/gpu.lock
	for name in requirements/venvs/*.in; do \
		$(COMPILE) $$name --excludes requirements/cpu_excluded.in -o $${name%.in}.lock || exit; \
	done

clean:
	rm -rf .venv .venv-gpu build *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
