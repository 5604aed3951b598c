# Every target does all its own set-up: a machine with Python 3.11+, a C linker and a Rust toolchain is enough.
#
#   make demo        a whole run on the shipped experts: table, figures, and where they are
#   make test        every Rust and Python test
#   make lint        rustfmt, clippy, ruff, mypy
#   make bench       Criterion benches of protocol overhead
#   make bench-gate  instruction counts against those recorded (valgrind)
#   make docs        rustdoc of every crate
#
# Variables:
#   PYTHON=python3.12                     interpreter for .venv
#   TORCH="torch==2.15.0 --index-url URL" another torch build (CPU-only, ROCm)
#   REUSE_TORCH=1                         use the torch of the calling environment instead of installing one

PYTHON ?= python3
TORCH ?= torch
REUSE_TORCH ?=
JOBS ?= 2
VENV := .venv
BIN := $(VENV)/bin
DEMO := demo-run

export CARGO_BUILD_JOBS ?= $(JOBS)
export PYO3_PYTHON := $(CURDIR)/$(BIN)/python
export PIP_DISABLE_PIP_VERSION_CHECK := 1
export TOKENIZERS_PARALLELISM := false
export HF_HUB_OFFLINE := 1

RUST_SOURCES := $(shell find crates -name '*.rs' -o -name Cargo.toml -o -name README.md 2>/dev/null) \
	Cargo.toml Cargo.lock $(wildcard configs/*.yaml configs/*/*.yaml)

.PHONY: demo test test-rust test-python lint bench bench-gate docs build clean

build: $(VENV)/.built

$(VENV)/.python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed")'
	$(PYTHON) -m venv $(if $(REUSE_TORCH),--system-site-packages) $(VENV)
	touch $@

# torch first and by itself, so that its source can be chosen without touching the rest.
$(VENV)/.torch: $(VENV)/.python
	$(if $(REUSE_TORCH),$(BIN)/python -c 'import torch',$(BIN)/pip install --quiet $(TORCH))
	touch $@

$(VENV)/.deps: $(VENV)/.torch pyproject.toml
	$(BIN)/python -c 'import tomllib; p = tomllib.load(open("pyproject.toml", "rb")); print("\n".join(p["build-system"]["requires"] + [d for d in p["project"]["dependencies"] if not d.startswith("torch")] + p["project"]["optional-dependencies"]["dev"]))' > $(VENV)/requirements.txt
	$(BIN)/pip install --quiet -r $(VENV)/requirements.txt
	touch $@

$(VENV)/.built: $(VENV)/.deps $(RUST_SOURCES)
	VIRTUAL_ENV=$(CURDIR)/$(VENV) $(BIN)/maturin develop --release --locked --quiet
	touch $@

demo: $(VENV)/.built
	rm -rf $(DEMO)
	$(BIN)/dlmom-rs run --suite A1 --experts zoo:tiny-math zoo:tiny-general --bench tinygsm --limit 60 \
		--alpha-unit nats --alpha 0.3 --seeds 0 1 --max-steps 256 --device cpu --dtype fp32 --out $(DEMO)
	$(BIN)/dlmom-rs aggregate $(DEMO)
	$(BIN)/dlmom-rs plot $(DEMO)

test: test-rust test-python

test-rust: $(VENV)/.python
	cargo test --locked --workspace --exclude dlmom-py --quiet

test-python: $(VENV)/.built
	$(BIN)/python -m pytest -q

lint: $(VENV)/.deps
	cargo fmt --all --check
	cargo clippy --locked --workspace --all-targets --quiet -- -D warnings
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(VENV)/.python
	cargo bench --locked -p dlmom-benches

bench-gate: $(VENV)/.python
	$(BIN)/python benches/gate.py

docs: $(VENV)/.python
	RUSTDOCFLAGS="-D warnings" cargo doc --locked --workspace --exclude dlmom-py --no-deps

clean:
	rm -rf target $(VENV) $(DEMO) python/dlmom_rs/*.so
