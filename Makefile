# Two commands for a newcomer:  make quickstart   and   make test
# Both create .venv first, from the lock file. PYTHON=python3.12 chooses another interpreter (3.11 to 3.13).
PYTHON ?= python3
BIN := .venv/bin

.PHONY: quickstart test fast lint lock clean

quickstart: .venv/.ready
	$(BIN)/python -m omr +quickstart=sweep

test: .venv/.ready lint
	$(BIN)/python -m pytest -m "not gpu and not backend"

fast: .venv/.ready
	$(BIN)/python -m pytest -m "not slow and not gpu and not backend"

lint: .venv/.ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

.venv/.ready: requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' \
	  || { echo "omr needs Python 3.11 to 3.13; choose one with: make PYTHON=python3.12"; exit 2; }
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.lock
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --editable .
	@touch $@

# After a change of the dependencies in pyproject.toml; torch stays pinned to the release that CI runs.
lock:
	echo "torch==2.13.0" > /tmp/omr-torch.txt
	$(BIN)/python -m pip install --quiet "pip-tools>=7.4"
	$(BIN)/pip-compile --quiet --strip-extras --extra dev --constraint /tmp/omr-torch.txt \
	  --no-header --no-emit-index-url --no-emit-find-links --no-annotate --output-file requirements.lock pyproject.toml
	sed -i 's/^\(torch==[0-9.]*\)+.*/\1/' requirements.lock
	sed -i '1i # Made by `make lock`: every dependency of omr[dev], exact. omr itself is installed beside it, --no-deps.' requirements.lock

clean:
	rm -rf .venv build dist *.egg-info
