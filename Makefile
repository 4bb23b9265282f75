# `make quickstart`, `make demo` and `make test` need nothing but Python >= 3.10 and make: the first of them builds the environment.

PYTHON ?= python3
# Two workers with one computing thread each; more threads than cores make the small models of the tests slower.
TEST_WORKERS ?= 2
TEST_THREADS ?= 1

VENV := .venv
INSTALLED := $(VENV)/.installed
QUICKSTART := outputs/quickstart
OFFLINE := HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help install quickstart demo test lint clean

help:
	@echo "make quickstart  pretrain a small InterBERT on drawn scenes and show what it retrieves"
	@echo "make demo        search, ask and look inside in the browser, with the model of the quickstart, which learns to"
	@echo "                 answer questions first"
	@echo "make test        run the tests"
	@echo "make lint        check the code style"
	@echo "make install     only build the environment in $(VENV); the targets above do so when needed"
	@echo "make clean       remove caches and build leftovers; $(VENV) and outputs stay"
	@echo
	@echo "PYTHON=python3.12 picks the interpreter of a new environment (now: $(PYTHON))."

quickstart: $(INSTALLED)
	$(OFFLINE) $(VENV)/bin/python examples/quickstart.py

demo: $(QUICKSTART)/vqa_model/config.json
	$(OFFLINE) $(VENV)/bin/python examples/app.py --model_name_or_path $(QUICKSTART)/model \
		--vqa_model_name_or_path $(QUICKSTART)/vqa_model --dataset_name $(QUICKSTART)/scenes

$(QUICKSTART)/model/config.json: | $(INSTALLED)
	$(OFFLINE) $(VENV)/bin/python examples/quickstart.py

$(QUICKSTART)/vqa_model/config.json: $(QUICKSTART)/model/config.json
	$(OFFLINE) ACCELERATE_USE_CPU=true $(VENV)/bin/python examples/run_vqa.py --do_train --do_eval \
		--model_name_or_path $(QUICKSTART)/model --dataset_name $(QUICKSTART)/scenes --output_dir $(@D) \
		--max_train_steps 800 --per_device_train_batch_size 64 --learning_rate 7e-4 --num_warmup_steps 100 \
		--overwrite_output_dir

test: $(INSTALLED)
	$(OFFLINE) OMP_NUM_THREADS=$(TEST_THREADS) $(VENV)/bin/python -m pytest -n $(TEST_WORKERS) --dist loadfile

lint: $(INSTALLED)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

install: $(INSTALLED)

# One pip call, so that constraints.txt decides every version, torch's included.
$(INSTALLED): setup.cfg pyproject.toml constraints.txt | $(VENV)/bin/pip
	$(VENV)/bin/python -m pip install --disable-pip-version-check \
		--constraint constraints.txt --editable ".[dev]"
	@touch $@

# pip is the last file that venv writes: an environment whose creation was interrupted is made again.
$(VENV)/bin/pip:
	@command -v $(PYTHON) > /dev/null || { echo "InterBERT needs Python >= 3.10, and there is no $(PYTHON) here:" \
		"name one with 'make PYTHON=/path/to/python3'." >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { echo "InterBERT needs Python >= 3.10," \
		"and $(PYTHON) is `$(PYTHON) --version 2>&1`: name another with 'make PYTHON=python3.12'." >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

clean:
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache
	find . -path ./$(VENV) -prune -o -type d -name __pycache__ -exec rm -rf {} +
