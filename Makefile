# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
# `make help` lists what there is. Every target installs the Debian packages it misses, and says so.

SHELL       := /bin/sh
export PATH := $(PATH):$(HOME)/.cargo/bin

need     := scripts/install-deps
guest    := guest-images/build/vtd-check.elf
binary   := target/release/twostage

# What `make demo` starts: two devices behind one virtual VT-d, the first of them with PASIDs.
demo_flags := --kernel $(guest) --memory size=256M --serial tty --report text \
              --iommu vtd,aw=57,pasid-bits=20 \
              --device edu,pasid=on,dma-mask=0xffffffffffffffff \
              --device edu,dma-mask=0xffffffffffffffff

help:
	@echo 'make run       build, and run Linux behind a virtual VT-d: under this machine'"'"'s KVM if Linux runs there, else nested'
	@echo 'make demo      build, and run the small test guest under /dev/kvm'
	@echo 'make test      lint, then every test, the guests among them'
	@echo 'make test-all  test, then more cases, optimised, bad input, Xen, the small guest under QEMU'"'"'s VT-d, and test-arm64'
	@echo 'make test-arm64  arm64 Linux guests behind a virtual SMMUv3, over a real /dev/iommu that QEMU emulates the hardware of'
	@echo 'make nested-check  the part of test that runs Linux guests'
	@echo 'make preload   libtwostage_iommufd.so, which shows any program an emulated /dev/iommu'
	@echo 'make selftests Linux'"'"'s own tests of iommufd, unmodified, under that library'
	@echo 'make bench     benchmarks (criterion), then comparisons with QEMU: in nested KVM, and compare-arm64'
	@echo 'make compare-arm64  calls of /dev/iommu for the same arm64 guest, beside those of QEMU'
	@echo 'make fuzz      10 million random sequences of ioctls, DMA and closes to the emulated host (nightly Rust)'
	@echo 'make loom      the gate that DMA reads translations through, in every order of its threads'
	@echo 'make tsan      DMA beside everything else for a minute, under ThreadSanitizer (a toolchain of rustup'"'"'s)'
	@echo 'make lint      format, clippy (for arm64, too), documentation, licences and sources of dependencies'
	@echo 'make binary-arm64  twostage for arm64, linked statically, in target/arm64'
	@echo 'make doc       API documentation'
	@echo 'make guest     the small test guest alone'
	@echo 'make clean     remove what was built'

run: binary
	scripts/linux-guest --timeout 480 </dev/null

demo: guest kvm binary
	$(binary) run $(demo_flags)

# Where there is no KVM, all else is tested first; then the target fails, unless KVM=off says that
# the guest is to be left out. NESTED=off leaves Linux guests out, TSAN=off what make tsan does.
test: lint guest
	@$(need) cc cargo
	TWOSTAGE_KVM=$$(scripts/kvm-here 2>/dev/null && echo on || echo off) cargo test --locked
	cargo test --locked -p twostage-emulated --features selftest --lib selftest
	TWOSTAGE_KVM=$$(scripts/kvm-here 2>/dev/null && echo on || echo off) cargo test --locked -p twostage-iommufd-preload
	scripts/check/iommufd-selftests
	@$(MAKE) --no-print-directory nested-check
	@scripts/kvm-here || [ "$(KVM)" = off ]

test-all: test loom
	@[ "$(TSAN)" = off ] || scripts/check/tsan
	TWOSTAGE_KVM=$(KVM) PROPTEST_CASES=4096 TWOSTAGE_STRESS_SECONDS=60 cargo test --locked --release -- --include-ignored
	scripts/check/guest-under-qemu
	@[ "$(NESTED)" = off ] || scripts/check/bad-inputs
	@[ "$(NESTED)" = off ] || scripts/check/xen
	@$(MAKE) --no-print-directory test-arm64

# The arm64 side: a real /dev/iommu, in a machine that QEMU emulates.
test-arm64: binary-arm64
	@NESTED=$(NESTED) scripts/check/linux-checks-arm64

# The small guest runs in the nested host where this machine's own KVM is not one for Linux.
nested-check: guest binary
	@[ "$(NESTED)" = off ] || $(binary) probe --report line || scripts/nested/x86_64 --timeout 480 -- run $(demo_flags) </dev/null
	@NESTED=$(NESTED) scripts/check/linux-checks

preload:
	@$(need) cc cargo
	cargo build --release --locked -p twostage-iommufd-preload
	@echo 'built target/release/libtwostage_iommufd.so; start a program with it in LD_PRELOAD'

selftests:
	@scripts/check/iommufd-selftests

bench:
	@$(need) cc cargo
	cargo bench --locked
	cargo build --release --locked -p twostage-vmm
	scripts/bench/compare-with-qemu
	@$(MAKE) --no-print-directory compare-arm64

# What twostage and QEMU ask of Linux's /dev/iommu for the same arm64 guest.
compare-arm64: binary-arm64
	scripts/bench/compare-with-qemu-arm64

# About twenty minutes. scripts/check/fuzz says how to run it longer or shorter.
fuzz:
	@$(need) cc c++ cargo
	scripts/check/fuzz ioctls 10000000

# Built apart: --cfg loom is for the whole crate graph.
loom:
	@$(need) cc cargo
	RUSTFLAGS='--cfg loom' CARGO_TARGET_DIR=target/loom cargo test --locked -p twostage-emulated --lib gate::model

tsan:
	@scripts/check/tsan

lint:
	@$(need) cc cargo rustfmt cargo-clippy
	cargo fmt --all --check
	cargo fmt --check --manifest-path tests/fuzz/Cargo.toml
	cargo clippy --locked --workspace --all-targets -- -D warnings
	@# Without the features that the others ask for.
	cargo clippy --locked -p twostage -- -D warnings
	cargo clippy --locked -p twostage-emulated -p twostage-iommufd-preload --all-targets --features selftest -- -D warnings
	@ARM64=$(ARM64) scripts/check/lint-arm64
	@# The fuzz targets compile. Nothing is linked, so libFuzzer itself is not built.
	CUSTOM_LIBFUZZER_PATH=./none cargo check --locked --manifest-path tests/fuzz/Cargo.toml
	RUSTDOCFLAGS='-D warnings' cargo doc --locked --no-deps --workspace --quiet
	scripts/check/cargo-deny --log-level error check licenses bans sources
	@# A mutation that finds nothing to change tests nothing.
	scripts/check/mutate-invalidations --lines

doc:
	@$(need) cc cargo
	RUSTDOCFLAGS='-D warnings' cargo doc --locked --no-deps -p twostage -p twostage-emulated
	@echo 'open target/doc/twostage/index.html'

guest:
	@$(need) make gcc objcopy
	@$(MAKE) --no-print-directory -C guest-images/vtd-check

binary:
	@$(need) cc cargo
	cargo build --release --locked -p twostage-vmm

binary-arm64:
	scripts/cargo-arm64 build --release --locked -p twostage-vmm

kvm:
	@scripts/kvm-here

clean:
	cargo clean
	rm -rf guest-images/build

.PHONY: help run demo test test-all test-arm64 nested-check preload selftests bench compare-arm64 fuzz loom tsan lint doc guest binary binary-arm64 kvm clean
.DEFAULT_GOAL := help
