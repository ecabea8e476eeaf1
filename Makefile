# Everything installs what it needs, into .venv.

PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test test-clients check fix chromium node clean

demo: .venv/runtime
	$(BIN)/python app.py

test: .venv/dev chromium node check
	$(BIN)/python -m pytest

# The hosted app's clients, older wire generations too.
test-clients: .venv/dev node
	$(BIN)/python -m pytest tests/clients -m "old_clients or not old_clients"

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

# The browser tests drive the distribution's Chromium, those of the JavaScript client its Node; without them (and
# without the right to install them) they skip.
install = @command -v $(1) >/dev/null \
	|| { [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null && apt-get update -qq \
	     && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq $(2) >/dev/null; } \
	|| echo "no $(1): the tests that need it will be skipped"

chromium:
	$(call install,chromium,chromium)

node:
	$(call install,npm,nodejs npm)

clean:
	rm -rf .venv .mypy_cache .ruff_cache .pytest_cache .hypothesis
