# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
# `make help` lists what there is. Every target installs the Debian packages it misses, and says so.

SHELL       := /bin/sh
export PATH := $(PATH):$(HOME)/.cargo/bin

need     := scripts/install-deps
guest    := guest-images/build/vtd-check.elf
binary   := target/release/twostage

# What `make run` starts: two devices behind one virtual VT-d, the first of them with PASIDs.
run_flags := --kernel $(guest) --memory size=256M --serial tty --report text \
             --iommu vtd,aw=57,pasid-bits=20 \
             --device edu,pasid=on,dma-mask=0xffffffffffffffff \
             --device edu,dma-mask=0xffffffffffffffff

help:
	@echo 'make run       build, and run the test guest under /dev/kvm with a virtual VT-d'
	@echo 'make test      lint, then every test, the guest under /dev/kvm among them'
	@echo 'make test-all  test, then more cases, optimised, the guest under QEMU'"'"'s VT-d, and nested-check'
	@echo 'make nested-check  in nested KVM (QEMU, emulated): the test guest, and Debian kernels behind the virtual VT-d'
	@echo 'make bench     benchmarks (criterion), then a comparison with QEMU in nested KVM'
	@echo 'make lint      format, clippy, documentation, licences and sources of dependencies'
	@echo 'make doc       API documentation'
	@echo 'make guest     the test guest alone'
	@echo 'make clean     remove what was built'

run: guest kvm
	@$(need) cc cargo
	cargo build --release --locked
	$(binary) run $(run_flags)

# Where there is no KVM, all else is tested first; then the target fails, unless KVM=off says that
# the guest is to be left out.
test: lint guest
	@$(need) cc cargo
	TWOSTAGE_KVM=$$(scripts/kvm-here 2>/dev/null && echo on || echo off) cargo test --locked
	cargo test --locked --no-default-features --lib
	@scripts/kvm-here || [ "$(KVM)" = off ]

test-all: test
	TWOSTAGE_KVM=$(KVM) PROPTEST_CASES=4096 cargo test --locked --release -- --include-ignored
	scripts/guest-under-qemu
	$(MAKE) --no-print-directory nested-check

nested-check: guest
	@$(need) cc cargo
	cargo build --release --locked
	scripts/nested -- run $(run_flags) </dev/null
	scripts/linux-checks

bench:
	@$(need) cc cargo
	cargo bench --locked
	cargo build --release --locked
	scripts/compare-with-qemu

lint:
	@$(need) cc cargo rustfmt cargo-clippy
	cargo fmt --check
	cargo clippy --locked --all-targets -- -D warnings
	cargo clippy --locked --all-targets --no-default-features -- -D warnings
	RUSTDOCFLAGS='-D warnings' cargo doc --locked --no-deps --quiet
	scripts/cargo-deny --log-level error check licenses bans sources

doc:
	@$(need) cc cargo
	RUSTDOCFLAGS='-D warnings' cargo doc --locked --no-deps
	@echo 'open target/doc/twostage/index.html'

guest:
	@$(need) make gcc objcopy
	@$(MAKE) --no-print-directory -C guest-images/vtd-check

kvm:
	@scripts/kvm-here

clean:
	cargo clean
	rm -rf guest-images/build

.PHONY: help run test test-all nested-check bench lint doc guest kvm clean
.DEFAULT_GOAL := help
