# `make` lists what there is to do.

export PATH := $(HOME)/.cargo/bin:$(PATH)
FOREBAY := target/release/forebay

.DEFAULT_GOAL := help
.PHONY: help setup build run test nixl gpu-check simulate chaos check audit bench clean

help: ## List these targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-9s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: ## Fetch nats-server and ONNX Runtime into .forebay/
	@scripts/setup.sh

build: ## Build the binary, target/release/forebay
	cargo build --release --locked --package forebay

run: setup build ## Start everything with the built-in model, and ask it something
	@exec $(FOREBAY) up --ask "What is a forebay?"

test: ## Run all tests, those against real servers and the OpenAI client too
	@scripts/setup.sh test
	cargo build --release --locked --workspace
	cargo test --release --locked --workspace

nixl: export LIBCLANG_PATH := $(CURDIR)/.forebay/clang
nixl: export FOREBAY_NIXL := $(CURDIR)/.forebay/nixl/lib
# Another compiler's headers: this libclang has none of its own.
nixl: export BINDGEN_EXTRA_CLANG_ARGS = -I$(shell gcc -print-file-name=include)
nixl: ## Build with NIXL, in target/nixl, and test KV over it (needs g++)
	@scripts/setup.sh nixl
	cargo build --release --locked --target-dir target/nixl --package forebay --features nixl
	cargo test --release --locked --target-dir target/nixl --package forebay-workers --features nixl --test leases

gpu-check: ## Check and measure a GPU, and write what was found into docs/gpu.md (without one: SKIPPED)
	@if ls /dev/nvidia[0-9]* >/dev/null 2>&1; then scripts/setup.sh gpu; else scripts/setup.sh; fi
	cargo build --release --locked --workspace
	scripts/gpu-check.sh

simulate: ## Run ten thousand seeds of the deterministic simulation (a minute)
	cargo build --release --locked --workspace
	target/release/simulate $(SIMULATE)

chaos: ## Kill, freeze and cut off everything under load, a thousand times with each engine (about 20 minutes)
	@scripts/setup.sh
	cargo build --release --locked --workspace
	target/release/chaos $(CHAOS)

check: ## Formatting, lints, dependencies, documentation
	@scripts/setup.sh dev
	cargo fmt --check
	cargo clippy --release --locked --workspace --all-targets -- -D warnings
	.forebay/bin/cargo-deny --locked check bans licenses sources
	RUSTDOCFLAGS="-D warnings" cargo doc --release --locked --no-deps --workspace

audit: ## Look for known vulnerabilities in dependencies (needs the network)
	@scripts/setup.sh dev
	.forebay/bin/cargo-deny --locked check advisories

bench: setup build ## Measure the control plane, the engine and KV reads on this machine
	$(FOREBAY) bench all

clean: ## Remove what was built (.forebay/ stays)
	cargo clean
