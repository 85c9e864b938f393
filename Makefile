# make demo | test | docs | lint | bench | soak | field | sanitize | mutations | versions | wheel | clean. Needs
# Python >= 3.10, a C++ compiler and make.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
TOOLS := $(VENV)/tools.stamp
INSTALLED := $(VENV)/installed.stamp
PEERS := $(VENV)/peers.stamp
FIELD := $(VENV)/field.stamp
DOCS := $(VENV)/docs.stamp
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

# A waiting OpenMP thread must not hold a core that somebody else could use.
export OMP_WAIT_POLICY ?= passive

SANITIZE := sanitize-solves sanitize-layers sanitize-cuda
.PHONY: demo test docs lint format bench soak field sanitize $(SANITIZE) mutations versions wheel build clean

demo: build
	$(BIN)/python -m hvp_engine demo $(ARGS)

test: build
	$(BIN)/python -m pytest -q --numprocesses auto --maxprocesses 4 --dist worksteal $(ARGS)

# Any warning, such as a link to nowhere, is an error.
docs: build $(DOCS)
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict
	@echo build/docs/index.html

soak: build
	$(BIN)/python -m pytest -q -m soak $(ARGS)

# Models of other packages; `python tools/field.py` times them and writes bench/results/field.csv.
field: build $(FIELD)
	$(BIN)/python -m pytest -q -m field --numprocesses auto --maxprocesses 4 --dist worksteal $(ARGS) \
		tests/test_field.py tests/test_examples_adapters.py

# The extension built once more, with sanitizers, in a folder of its own; then the CUDA kernels on the CPU, also with a
# thread of the system for each of a block's, where races show. libasan must come before everything else, and libstdc++
# with it, whose exceptions it watches; Python's own leaks at its end are not ours.
SANITIZED := build/sanitize
WITH_LIBASAN := LD_PRELOAD="$$(g++ -print-file-name=libasan.so) $$(g++ -print-file-name=libstdc++.so)" \
	ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1
sanitize: $(SANITIZE)

sanitize-solves sanitize-layers: sanitize-%: $(SANITIZED)/built.stamp
	$(WITH_LIBASAN) $(BIN)/python tests/run_sanitized.py $(SANITIZED) $*

sanitize-cuda: build
	mkdir -p $(SANITIZED)
	$(BIN)/python tests/run_cuda_on_cpu.py build address $(SANITIZED)/cuda_on_cpu.so
	$(BIN)/python tests/run_cuda_on_cpu.py build races $(SANITIZED)/cuda_races
	$(WITH_LIBASAN) PYTHONPATH=. $(BIN)/python tests/run_cuda_on_cpu.py in-order $(SANITIZED)/cuda_on_cpu.so \
		tests/test_ops.py -k "cpu-cpp and (mixed or state or unaligned) and not threads"
	$(SANITIZED)/cuda_races

$(SANITIZED)/built.stamp: $(INSTALLED) $(wildcard csrc/*)
	$(BIN)/cmake -S . -B $(SANITIZED) -G Ninja -DCMAKE_MAKE_PROGRAM="$(CURDIR)/$(BIN)/ninja" -DHVP_ENGINE_SANITIZE=ON \
		-DHVP_ENGINE_CUDA=OFF -DCMAKE_CXX_COMPILER=g++ -DPython_EXECUTABLE="$(CURDIR)/$(BIN)/python" \
		-Dpybind11_DIR="$$($(BIN)/python -m pybind11 --cmakedir)" > /dev/null
	$(BIN)/cmake --build $(SANITIZED)
	@touch $@

# Would the tests notice a fault? ARGS="--only kernels/" tries some of them; an interrupted run continues.
mutations: build
	$(BIN)/python -m tools.mutations $(ARGS)

# Every torch and Python that the package names, each in an environment of its own. ARGS="--only 2.15" tries some of
# them; an interrupted run continues.
versions: build
	$(BIN)/python -m tools.versions $(ARGS)

# Correctness first: nothing is timed where a test of a timed path fails.
bench: build $(PEERS)
	$(BIN)/python -m pytest -q -x tests/test_kernels*.py tests/test_native.py tests/test_implicit.py tests/test_engines*.py \
		tests/test_solv*.py tests/test_bench.py
	$(BIN)/python -m bench.run $(ARGS)

lint: build
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run -Werror csrc/* tests/cuda_on_cpu/*

format: build
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i csrc/* tests/cuda_on_cpu/*

# The wheel is built from the sdist, which shows that the sdist is complete. auditwheel finds the oldest glibc that it
# runs on and names it accordingly; libgomp stays outside, since the one that torch brings is to be shared.
wheel: build
	rm -rf dist build/dist
	mkdir -p build
	{ $(BIN)/python -m build --no-isolation --outdir build/dist && PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/auditwheel \
		repair --exclude libgomp.so.1 --wheel-dir dist build/dist/*.whl; } > build/wheel.log 2>&1 \
		|| { cat build/wheel.log; false; }
	mv build/dist/*.tar.gz dist
	@ls dist

build: $(INSTALLED)

# Python files are used where they are; only a change of the extension or of the packaging installs again.
$(INSTALLED): $(TOOLS) pyproject.toml setup.py CMakeLists.txt $(wildcard csrc/*)
	$(PIP) --no-build-isolation --editable '.[dev,triton]'
	$(BIN)/python -c "import hvp_engine.ops.cpp"
	@touch $@

# What the build itself needs, as pyproject.toml names it, comes first, since the package is built without isolation.
$(TOOLS): constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) 'setuptools>=77' 'pybind11>=2.13' 'cmake>=3.24' ninja wheel
	@touch $@

$(DOCS): $(INSTALLED)
	$(PIP) --no-build-isolation --editable '.[docs]'
	@touch $@

# Each by itself: where one cannot be had, the benchmark goes without it and says so.
$(PEERS): $(INSTALLED)
	for peer in betty-ml curvlinops-for-pytorch torchopt higher hypergrad; do \
		$(PIP) $$peer || echo "$$peer: not installed, left out of the benchmark"; \
	done
	@touch $@

# Each by itself, and without what would replace this torch; models whose package is missing are left out.
$(FIELD): $(INSTALLED)
	for package in transformers peft timm torch_geometric diffusers; do \
		$(PIP) $$package "torch==$$($(BIN)/python -c 'import torch; print(torch.__version__)')" \
			|| echo "$$package: not installed, its models are left out"; \
	done
	@touch $@

clean:
	rm -rf build dist *.egg-info $(INSTALLED) $(PEERS) $(FIELD) $(DOCS) hvp_engine/_C.*.so
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +
