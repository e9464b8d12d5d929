# make help lists the targets.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# make demo TEXT=folder uses a folder of train.en, train.de, val.en, val.de (plain or .gz).
TEXT ?=
# make reliability TABLE=docs/reliability.md writes the table there, make bench-replay its page.
TABLE ?=
OUT ?= demo-out$(if $(TEXT),/$(notdir $(TEXT:/=)))

.DEFAULT_GOAL := help
.PHONY: help install demo test test-external reliability bench-recorder bench-replay check format constraints clean

help: ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/  make \1\t\2/' | expand -t 22

install: $(VENV)/installed ## make .venv with everything pinned, fairseq 0.12.2 included

# fairseq's metadata pins omegaconf 2.0, which pip >= 24.1 refuses; what it needs is in our extra instead.
# Its build takes place in an isolated environment, which the constraints reach through the environment.
$(VENV)/installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "lossledger needs Python 3.11 or newer; found $$($(PYTHON) --version). Try: make PYTHON=python3.11" >&2; exit 2; }
	@command -v c++ >/dev/null || command -v g++ >/dev/null || { echo "fairseq needs a C++ compiler: install g++ or clang" >&2; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade --constraint constraints.txt pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[fairseq,hf,lightning,demo,dev]'
	PIP_CONSTRAINT=$(abspath constraints.txt) PIP_BUILD_CONSTRAINT=$(abspath constraints.txt) \
		$(BIN)/python -m pip install --quiet --no-deps fairseq==0.12.2
	touch $@

demo: install ## from text to the paper's first figure: three trainings, replay, cubes (about 3 minutes)
	$(BIN)/python -m demo --out $(OUT) $(if $(TEXT),--text $(TEXT))

test: install ## the test suite, the whole way on a short run included
	$(BIN)/python -m pytest

test-external: install ## the trainers alone: fairseq, transformers, accelerate, Lightning and the examples
	$(BIN)/python -m pytest tests/external

bench-recorder: install ## what recording every step costs: time, bytes (about half an hour, best on a quiet machine)
	$(BIN)/python -m benchmarks.recorder $(if $(TEXT),--text $(TEXT))

bench-replay: install ## what replay costs beside its gradients, and how fast its variants are (about 20 minutes, best on a quiet machine)
	$(BIN)/python -m benchmarks.replay $(if $(TABLE),> $(TABLE))

reliability: install ## every promise of a run, as often as promised, in one table (some hours on two cores)
	LOSSLEDGER_RELIABILITY=full LOSSLEDGER_EXAMPLES=10000 LOSSLEDGER_RELIABILITY_TABLE=$(TABLE) $(BIN)/python -m pytest \
		tests/reliability $(wildcard $(addprefix tests/recorder/test_,codec.py golden.py estimate.py)) --timeout 0

check: install ## ruff, mypy and the import contracts
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: install ## let ruff format the code
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

constraints: install ## write down what is installed now as the pinned versions
	$(BIN)/python -m pip freeze --all --exclude-editable | grep -v '^fairseq' | sed 's/+cpu$$//' > constraints.txt

clean: ## remove .venv, caches and the demo's output
	rm -rf $(VENV) demo-out .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache *.egg-info
