# `make demo` and `make test` set up .venv on their first call. PYTHON chooses the interpreter, VENV the folder, TESTS
# the files to test.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
WORKERS ?= 2
TESTS ?= tests

.PHONY: demo demo-quick demo-switch test test-all test-references test-wide measure-peers lint format lock clean

demo: $(VENV)/.ready        ## train the three variants, convert, evaluate, compare: runs/demo/report/report.html
	$(BIN)/python -m prenorm_jax.demo --workdir=runs/demo

demo-quick: $(VENV)/.ready  ## the same in two minutes: fewer steps, a smaller model
	$(BIN)/python -m prenorm_jax.demo --workdir=runs/demo-quick --quick

demo-switch: $(VENV)/.ready ## one run whose norm is switched every 25 steps, beside the drift of rounding alone
	$(BIN)/python -m prenorm_jax.demo --workdir=runs/demo-switch --switch

test: $(VENV)/.ready        ## the tests, but for the long ones
	$(BIN)/python -m pytest -n $(WORKERS) -m "not slow and not wide and not reference" $(TESTS)

test-all: $(VENV)/.ready    ## the long ones too
	$(BIN)/python -m pytest -n $(WORKERS) -m "not wide and not reference" $(TESTS)

test-references: .venv-references/.ready  ## beside other libraries, PyTorch and transformers among them
	.venv-references/bin/python -m pytest -n $(WORKERS) -m reference tests/references

test-wide: $(VENV)/.ready   ## searches for examples that nobody thought of: hours; after a change to what they search
	$(BIN)/python -m pytest -n $(WORKERS) -m wide $(TESTS)

measure-peers: .venv-peers/.ready  ## beside Brevitas, and with PEERS="--slicegpt=CLONE" SliceGPT: the docs' tables
	PYTHONPATH=.:tests:tests/references XLA_FLAGS=--xla_backend_optimization_level=0 .venv-peers/bin/python tests/references/measure_peers.py --write $(PEERS)

lint: $(VENV)/.ready        ## what .ci/run checks before it tests
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports

format: $(VENV)/.ready
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

lock: $(VENV)/.ready        ## new exact pins from the ranges in requirements*.txt
	$(BIN)/pip install --quiet uv
	$(BIN)/uv pip compile --quiet --upgrade --universal --python-version 3.11 --fork-strategy requires-python \
	    --no-header --no-annotate requirements.txt requirements-dev.txt -o requirements.lock
	sed -i '1i # Exact, tested versions: what `make` installs. Made from the ranges by `make lock`.' requirements.lock

clean:                      ## everything that make made but runs/
	rm -rf .venv* .pytest_cache .ruff_cache .hypothesis build *.egg-info

# PyTorch by pip itself and by its exact version: pip takes a wheel for CPUs where it is given one, and of a range the
# largest, which is CUDA's, of gigabytes. timm without what it asks for: PyPI's torchvision does not fit a PyTorch for
# CPUs, and the tests do without it.
.venv-references/.ready .venv-peers/.ready: requirements.lock requirements-references.txt $(VENV)/.ready
	@echo "setting up $(@D) (some minutes)"
	@$(BIN)/python -m venv --clear $(@D)
	@$(@D)/bin/pip install --quiet --disable-pip-version-check torch==2.13.0
	@$(BIN)/uv pip install --quiet --python $(@D)/bin/python -r requirements.lock -r requirements-references.txt $(OTHERS)
	@$(BIN)/uv pip install --quiet --python $(@D)/bin/python --no-deps timm==1.0.31
	@touch $@

.venv-peers/.ready: OTHERS := brevitas==0.13.4

# A marker file rather than the folder: a set-up that was interrupted is done again.
$(VENV)/.ready: requirements.lock
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	    || { echo "error: $(PYTHON) is older than Python 3.11: name another, as in make $(MAKECMDGOALS) PYTHON=python3.12"; exit 1; }
	@[ ! -L $(VENV) ] || { echo "error: $(VENV) is a link: what it leads to would be cleared; remove it"; exit 1; }
	@echo "setting up $(VENV) (about a minute)"
	@$(PYTHON) -m venv --clear $(VENV)
	@$(BIN)/pip install --quiet --disable-pip-version-check uv
	@$(BIN)/uv pip install --quiet --python $(BIN)/python -r requirements.lock
	@touch $@
