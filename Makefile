# Everything installs what it needs, into .venv.

PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test check fix chromium clean

demo: .venv/runtime
	$(BIN)/python app.py

test: .venv/dev chromium check
	$(BIN)/python -m pytest

check: .venv/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

fix: .venv/dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

.venv/runtime: requirements.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --disable-pip-version-check --requirement requirements.txt
	touch $@

.venv/dev: requirements.txt requirements-dev.txt training/requirements.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --disable-pip-version-check --requirement requirements-dev.txt
	touch $@

# The browser tests drive the distribution's Chromium; without it (and without the right to install it) they skip.
chromium:
	@command -v chromium >/dev/null || command -v chromium-browser >/dev/null \
	|| { [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null && apt-get update -qq \
	     && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq chromium >/dev/null; } \
	|| echo "no Chromium: the browser tests will be skipped"

clean:
	rm -rf .venv .mypy_cache .ruff_cache .pytest_cache .hypothesis
