# Every target sets up what it needs in $(VENV), inside the checkout; a second run reuses it.
PYTHON ?= python3
VENV ?= .venv
PY := $(VENV)/bin/python
TOOLS := PATH="$(abspath $(VENV)/bin):$$PATH"

# csrc's folders too: a file added or deleted is a change. So is another torch.
SOURCES := $(shell find csrc) setup.py pyproject.toml \
  $(wildcard $(VENV)/lib/python*/site-packages/torch/version.py)
CPP := $(shell find csrc tests/cpp examples -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh')
SET_UP := $(VENV)/.set-up
BUILT := $(VENV)/.built
WORKERS ?= 2
SANITIZED := build/cpp-sanitize
# Which of the files in examples/ are scripts, in the order of docs/gallery.md.
EXAMPLES := $(patsubst %,examples/%.py, \
  convergence surfaces digits_race schedules sgd_parameters custom_rule)

.DEFAULT_GOAL := help
.PHONY: help build bench bench-peers bench-docs examples test test-tools test-long test-cpp
.PHONY: lint format clean check-python
ifeq ($(wildcard fusedopt/_build_info.py),)
.PHONY: $(BUILT)
endif

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 12
	@echo 'Variables: PYTHON (makes the virtual environment), VENV (where), MAX_JOBS (compilers at'
	@echo 'once), WORKERS (processes of tests), BENCH_ARGS, EXAMPLE_ARGS, PYTEST_ARGS.'
	@echo '`make test PYTEST_ARGS="-n 0 -k adam"` runs a part.'

build: $(BUILT) ## build the extension in place

bench: $(BUILT) ## train real networks, time the step; tables and pictures in build/bench
	$(PY) -m fusedopt.bench $(BENCH_ARGS)

examples: $(BUILT) ## run the examples; their pictures in build/examples
	@set -e; for script in $(EXAMPLES); do \
	  echo "== $$script"; $(PY) $$script --out build/examples $(EXAMPLE_ARGS); \
	done
# Without their dependencies: no library may bring another torch, or a CUDA build of it. What else
# they need, and does not depend on torch, comes first.
PEERS_NEED := einops hjson msgpack psutil py-cpuinfo pydantic tqdm
bench-peers: $(BUILT) ## install the libraries that the step is compared with, as far as they install
	-$(PY) -m pip install --quiet --disable-pip-version-check $(PEERS_NEED)
	@grep -v '^#' requirements-peers.txt | while read -r peer; do \
	  $(PY) -m pip install --quiet --disable-pip-version-check --no-deps "$$peer" || \
	    echo "bench-peers: $$peer does not install (pip says why, above); going on without it"; \
	done
	$(PY) -m fusedopt.bench list

bench-docs: $(BUILT) ## write the tables of README.md and docs/ from bench/results
	$(PY) -m fusedopt.bench report --update-docs $(BENCH_ARGS)

# A core for each process, which the tests of threads override; the slowest tests are listed.
PYTEST = OMP_NUM_THREADS=1 $(PY) -m pytest -q -n $(WORKERS) --dist loadgroup \
  --durations=15 --durations-min=5
test: $(BUILT) ## the tests, but for those of the tools and the slow ones
	$(PYTEST) -m "not slow and not tools" $(PYTEST_ARGS)

test-tools: $(BUILT) ## the tests of the benchmark, the examples and the docs
	$(PYTEST) -m "tools and not slow" $(PYTEST_ARGS)

test-long: $(BUILT) ## the slow tests
	$(PYTEST) -m slow $(PYTEST_ARGS)

test-cpp: $(SET_UP) ## the C++ tests under AddressSanitizer and UBSan
	$(TOOLS) cmake -S . -B $(SANITIZED) -G Ninja -DFUSEDOPT_SANITIZE=ON \
	  -DPython3_EXECUTABLE=$(abspath $(PY))
	$(TOOLS) cmake --build $(SANITIZED) $(if $(MAX_JOBS),-j $(MAX_JOBS))
	$(TOOLS) ctest --test-dir $(SANITIZED) --output-on-failure

lint: $(SET_UP) ## ruff, mypy on the package, clang-format
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy
	$(VENV)/bin/clang-format --dry-run -Werror $(CPP)

format: $(SET_UP) ## rewrite the sources as lint wants them
	$(PY) -m ruff check --fix --exit-zero .
	$(PY) -m ruff format .
	$(VENV)/bin/clang-format -i $(CPP)

clean: ## remove what was built; the virtual environment stays
	rm -rf build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	rm -f fusedopt/*.so fusedopt/_build_info.py $(BUILT)

check-python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo 'fusedopt needs Python 3.10 or newer: make PYTHON=python3.12 ...' >&2; exit 1; }

# An environment that is there is used as it is; PYTHON only makes new ones.
$(SET_UP): requirements-dev.txt $(if $(wildcard $(PY)),,| check-python)
	@$(PY) -m pip --version > /dev/null 2>&1 || $(PYTHON) -m venv $(VENV)
	@echo 'Installing requirements-dev.txt into $(VENV) (a few minutes the first time)'
	$(PY) -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	@touch $@

$(BUILT): $(SET_UP) $(SOURCES)
	@echo 'Building fusedopt in place (minutes the first time); CUDA kernels where nvcc and torch allow'
	$(PY) -m pip install --quiet --disable-pip-version-check --no-build-isolation -e .
	@touch $@
