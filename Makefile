# make demo     see it work on a real disk        make test    install, build, run every test
# make build    compile in place for development  make wheel   a wheel that carries its libraries
# make bench    measure                           make lint    style and types
# make crash SECONDS=600 (or STATES=100000)        cuts of power: every state that they may leave
# make faults                                      every storage call of every verb fails once
# make mutants                                     would make crash notice? each edge left out once
# make reliability                                 all of them; their figures become docs/reliability.md
# make soak SECONDS=600 (or OPERATIONS=1000000)    random operations beside a model
# make fuzz SECONDS=600                            damaged images, guided by what they lead to
# make fuzz-qemu SECONDS=600                       QEMU's own image fuzzer, on our programs
# make race SECONDS=60                             threads of every kind on one image
# make asan SECONDS=600 (or TESTS=test_header.py)  tests and soak, the core watched by sanitizers
# make instructions  what the paths that only compute take, beside the committed counts
# make man      the manual pages of qcow2x-img and qcow2x-io, into build/man
# make iotests  QEMU's own tests of qcow2, with our programs in place of qemu-img and qemu-io
# make iotests-matrix  the same under other image options, beside what the system's tools pass; an hour
#
# Everything happens in .venv; a second run does only what changed. PYTHON chooses the
# interpreter: the first Python 3.11 or newer on PATH unless given.

PYTHON ?= $(shell for name in python3 python3.14 python3.13 python3.12 python3.11; do \
	"$$name" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null \
	&& { command -v "$$name"; break; }; done)
ifeq ($(strip $(PYTHON)),)
$(error Python 3.11 or newer is needed: sudo apt install python3 (Fedora: sudo dnf install python3))
endif

VENV ?= .venv
BIN := $(abspath $(VENV))/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet
# What the package is made of; a change to any of it means a build.
SOURCES := setup.py pyproject.toml MANIFEST.in $(wildcard README.md) \
	$(shell find build_support include third_party qcow2x -type f -not -name '*.so' -not -name '*.pyc')

.PHONY: demo test man iotests iotests-matrix crash faults mutants reliability soak fuzz fuzz-qemu race asan build wheel sdist bench instructions lint deps clean

demo: $(VENV)/.installed
	@$(PYTHON) scripts/install_needs.py demo
	$(BIN)/qcow2x demo

# The tests run from their own folder, so that they meet the installed package as users do.
test: $(VENV)/.installed
	@$(PYTHON) scripts/install_needs.py test
	$(BIN)/ruff check
	cd tests && $(BIN)/python -m pytest

# IOTESTS="001 013" runs only those; SOURCE=DIR takes a source tree of QEMU that is there already
# instead of fetching one.
iotests: $(VENV)/.installed
	@$(PYTHON) scripts/install_needs.py iotests
	$(BIN)/python tests/iotests/run.py $(if $(SOURCE),--source $(SOURCE)) $(IOTESTS)

man: $(VENV)/.installed
	$(BIN)/python scripts/make_man.py build/man

iotests-matrix: $(VENV)/.installed
	@$(PYTHON) scripts/install_needs.py iotests
	$(BIN)/python tests/iotests/matrix.py $(if $(SOURCE),--source $(SOURCE)) $(IOTESTS)

crash: $(VENV)/.installed
	@$(PYTHON) scripts/install_needs.py test
	cd tests && $(BIN)/python -m campaigns.crash $(if $(STATES),--states $(STATES),--seconds $(or $(SECONDS),600)) --seed $(or $(SEED),0) $(ARGS)

faults: $(VENV)/.installed
	cd tests && $(BIN)/python -m campaigns.faults $(ARGS)

# A build of its own, below build/mutant.
mutants: $(VENV)/.installed
	$(BIN)/python scripts/build_mutant.py
	cd tests && $(BIN)/python -m campaigns.mutants $(ARGS)

# SOME="crash faults" runs only those; the figures of the others stay.
SOME ?= crash mutants faults soak fuzz fuzz-qemu asan race
FIGURES := $(abspath docs/reliability)
reliability:
	@mkdir -p $(FIGURES)
	for name in $(SOME); do $(MAKE) $$name ARGS=--json=$(FIGURES)/$$name.json || exit 1; done
	$(PYTHON) scripts/reliability.py

# SEED=N begins with another run; ARGS="--trace" and the like are handed on.
soak: $(VENV)/.installed
	@$(PYTHON) scripts/install_needs.py test
	cd tests && $(BIN)/python -m campaigns.soak $(if $(OPERATIONS),--operations $(OPERATIONS),--seconds $(or $(SECONDS),600)) --seed $(or $(SEED),0) $(ARGS)

# What it finds lies in build/fuzz: ARGS="--replay NAME" uses one image again.
fuzz: $(VENV)/.ready
	@$(PYTHON) scripts/install_needs.py build test
	cd tests && $(BIN)/python -m campaigns.fuzz --seconds $(or $(SECONDS),600) --seed $(or $(SEED),0) $(ARGS)

# Fetched as for iotests, or in SOURCE=DIR. Images and logs of what it finds lie in build/fuzz/qemu;
# SEED=N IMAGES=1 makes image N again.
fuzz-qemu: $(VENV)/.ready
	@$(PYTHON) scripts/install_needs.py build test
	cd tests && $(BIN)/python -m campaigns.fuzz.qemu $(if $(SOURCE),--source $(abspath $(SOURCE))) $(if $(IMAGES),--images $(IMAGES),--seconds $(or $(SECONDS),600)) --seed $(or $(SEED),0) $(ARGS)

# A build of its own, below build/tsan.
race: $(VENV)/.ready
	@$(PYTHON) scripts/install_needs.py build test
	cd tests && $(BIN)/python -m campaigns.race --seconds $(or $(SECONDS),60) --seed $(or $(SEED),0) $(ARGS)

# A build of its own, below build/asan; the tests meet it instead of the installed package.
asan: $(VENV)/.ready
	@$(PYTHON) scripts/install_needs.py build test
	cd tests && $(BIN)/python -m campaigns.asan --seconds $(or $(SECONDS),600) --seed $(or $(SEED),0) $(ARGS) $(TESTS)

# Compiled before it is linked, so that the compiler's warnings are seen.
build: $(VENV)/.ready
	@$(PYTHON) scripts/install_needs.py build
	$(BIN)/python setup.py --quiet build_ext --inplace
	@$(MAKE) --no-print-directory $(VENV)/.linked

# ROUNDS=1 is a quick look; WHAT=bench_convert.py, or "-k chain", a part. A whole run on an idle
# machine writes bench/report.md and its plots.
bench: $(VENV)/.installed
	@$(PYTHON) scripts/install_needs.py demo
	cd bench && QCOW2X_BENCH_ROUNDS=$(ROUNDS) $(BIN)/python -m pytest $(or $(WHAT),.)

# UPDATE=1 commits to the counts as they are now.
instructions: $(VENV)/.installed
	@$(PYTHON) scripts/install_needs.py instructions
	cd bench && $(BIN)/python instructions.py $(if $(UPDATE),--update)

lint: $(VENV)/.installed
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

# From the source distribution, as a packager would, so that it is known to be complete.
wheel: $(VENV)/.wheel-tools
	rm -rf dist wheelhouse
	$(BIN)/python -m build --no-isolation --outdir dist
	PATH="$(BIN):$$PATH" $(BIN)/auditwheel repair --strip --wheel-dir wheelhouse dist/*.whl
	scripts/verify_wheel.sh wheelhouse/*.whl $(BIN)/python

sdist: $(VENV)/.wheel-tools
	$(BIN)/python -m build --no-isolation --sdist --outdir dist

deps: $(VENV)/.ready
	@$(PYTHON) scripts/install_needs.py build test demo

clean:
	rm -rf $(VENV) .iotests build dist wheelhouse *.egg-info .pytest_cache .hypothesis .benchmarks \
		.mypy_cache .ruff_cache
	find qcow2x -name '*.so' -delete
	find . -name __pycache__ -prune -exec rm -rf {} +

$(VENV)/.ready: pyproject.toml scripts/requirements.py
	@$(PYTHON) scripts/install_needs.py build
	$(PYTHON) -m venv $(VENV)
	$(PIP) install $$($(PYTHON) scripts/requirements.py build test lint)
	@touch $@

$(VENV)/.wheel-tools: $(VENV)/.ready
	$(PIP) install $$($(PYTHON) scripts/requirements.py wheel)
	@touch $@

# Without build isolation the build folder is kept, and only what changed is compiled again.
$(VENV)/.installed: $(VENV)/.ready $(SOURCES)
	@$(PYTHON) scripts/install_needs.py build
	$(PIP) install --no-build-isolation --no-deps --force-reinstall .
	@rm -f $(VENV)/.linked
	@touch $@

# A plain path entry, not an import hook: Cython looks for .pxd files along sys.path.
$(VENV)/.linked: $(VENV)/.ready
	$(PIP) install --no-build-isolation --no-deps --config-settings editable_mode=compat --editable .
	@rm -f $(VENV)/.installed
	@touch $@
