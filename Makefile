# personatlas: `make demo` shows it, `make test` proves it, `make check` reads it.
PYTHON ?= python3
BIN := .venv/bin
PACKAGES := persona analysis steering training

PIP := $(BIN)/python -m pip install --quiet --no-compile --disable-pip-version-check --constraint requirements.lock

.PHONY: .check install demo demo-train test test-slow test-robustness check notebooks docs format clean

# everything, for development; .venv/runs is what the package itself needs
install: .venv/installed
	@echo "installed; now: source .venv/bin/activate"

# Python compiles what is imported when it is imported: compiling every file of torch and transformers takes longer than the rest
.venv/runs: pyproject.toml requirements.lock
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(PIP) torch
	$(PIP) --editable .
	touch $@

.venv/installed: .venv/runs
	$(PIP) --editable '.[dev]'
	touch $@

demo: .venv/runs
	$(BIN)/personatlas axis smollm2-135m --plan demo --out runs/demo

# a tokenizer, a GPT of 4 layers, its tuning to questions and answers, its axis, and a word with it
DEMO := runs/demo-train
demo-train: .venv/runs
	$(BIN)/python -m personatlas.training.data.demo_text $(DEMO)/data
	$(BIN)/personatlas train base --depth 4 --minutes 2 --corpus $(DEMO)/data/text --held-share 0.04 --vocabulary 1024 --context 256 --device cpu --out $(DEMO)/base
	$(BIN)/personatlas train chat $(DEMO)/base --minutes 1 --data $(DEMO)/data/chats.jsonl --device cpu --out $(DEMO)/chat
	$(BIN)/personatlas axis $(DEMO)/chat --roles 8 --prompts 1 --questions 8 --max-new-tokens 16 --judge none --keep all --replicates 20 --device cpu --out $(DEMO)/axis
	$(BIN)/personatlas chat $(DEMO)/chat --axis $(DEMO)/axis --max-new-tokens 64 --message "What does textwrap.indent do?" --message "What is queue.Queue?" --device cpu

# two processes, one thread each: on two cores they are done in two thirds of the time that one process takes
test: .venv/installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not slow and not robustness" --numprocesses 2 --dist loadfile --no-loadscope-reorder

test-slow: .venv/installed
	$(BIN)/python -m pytest -m slow

# what `make test` tries on a sample: fuzzed files, errors of the disk, kills, thousands of requests
test-robustness: .venv/installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m robustness --numprocesses 2

# mypy and mkdocstrings read the packages under their installed names through links, since editable installs are opaque to them
.check: .venv/installed
	mkdir -p .check/personatlas
	for package in $(PACKAGES); do ln -sfn ../../$$package .check/personatlas/$$package; done
	for file in cli api.py __init__.py __main__.py py.typed; do ln -sfn ../../personatlas/$$file .check/personatlas/$$file; done

check: .check
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	cd .check && MYPYPATH=. ../$(BIN)/mypy --config-file ../pyproject.toml -p personatlas
	$(BIN)/python -m pytest tests/test_architecture.py

# runs the notebooks and stores what they show
notebooks: .venv/installed
	$(BIN)/python tests/docs/execute_notebooks.py

docs: .check
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

format: .venv/installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf .venv .check site build *.egg-info .mypy_cache .ruff_cache .pytest_cache
