# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
# `make help` lists the targets. Each installs the Debian packages that it needs.

SHELL       := /bin/sh
export PATH := $(PATH):$(HOME)/.cargo/bin

need     := scripts/install-deps
guest    := guest-images/build/vtd-check.elf
binary   := target/release/twostage

# `make demo`: two devices behind one virtual VT-d, the first with PASIDs.
demo_flags := --kernel $(guest) --memory size=256M --serial tty --report text \
              --iommu vtd,aw=57,pasid-bits=20 \
              --device edu,pasid=on,dma-mask=0xffffffffffffffff \
              --device edu,dma-mask=0xffffffffffffffff

help:
	@echo 'make run           build, and run Linux behind a virtual VT-d, in nested KVM if necessary'
	@echo 'make demo          build, and run the small test guest on /dev/kvm'
	@echo 'make test          lint, then every test, including guests'
	@echo 'make test-all      test, then more and longer tests, bad inputs, Xen, the small guest'
	@echo '                   on QEMU'"'"'s VT-d, qemu-demo, test-x86-host, test-arm64'
	@echo 'make test-x86-host twostage and others on the /dev/iommu of a Linux behind its own VT-d; then'
	@echo '                   on hosts that cannot nest'
	@echo 'make test-arm64    arm64 Linux guests behind a virtual SMMUv3, on a real /dev/iommu in an'
	@echo '                   emulated arm64 host'
	@echo 'make nested-check  the part of test that runs Linux guests'
	@echo 'make preload       libtwostage_iommufd.so: an emulated /dev/iommu for any program'
	@echo 'make package       in target/package: the crates as crates.io takes them, and the library'
	@echo '                   as a Debian package'
	@echo 'make qemu-demo     QEMU 11 nests on that library, beside twostage; then Linux on it'
	@echo 'make selftests     Linux'"'"'s iommufd selftests, unmodified, under that library'
	@echo 'make bench         benchmarks (criterion), then comparisons with QEMU'
	@echo 'make compare-arm64 /dev/iommu calls for the same arm64 guest, compared with QEMU'"'"'s'
	@echo 'make fuzz          fuzzers of all that guests, files and programs reach, RUNS executions'
	@echo '                   of TARGET, or a million of each; and what they reach (nightly Rust)'
	@echo 'make fuzz-all      the same for SECONDS (600), shared by all targets on all processors'
	@echo 'make loom          the lock-free gate of DMA lookups, in all thread interleavings'
	@echo 'make tsan          concurrent DMA and changes for a minute under ThreadSanitizer (rustup)'
	@echo 'make lint          format, clippy (for arm64, too), documentation, dependencies'
	@echo 'make binary-arm64  twostage for arm64, linked statically, in target/arm64'
	@echo 'make doc           API documentation'
	@echo 'make guest         the small test guest'
	@echo 'make clean         remove all build results'

run: binary
	scripts/linux-guest --timeout 600 </dev/null

demo: guest kvm binary
	$(binary) run $(demo_flags)

# Without KVM, everything else is tested first; then the target fails, unless KVM=off skips the
# guest. NESTED=off skips Linux guests.
test: lint guest
	@$(need) cc cargo strace
	TWOSTAGE_KVM=$$(scripts/kvm-here 2>/dev/null && echo on || echo off) cargo test --locked
	cargo test --locked -p twostage-emulated --features selftest --lib selftest
	cargo test --locked -p twostage-fuzz
	TWOSTAGE_KVM=$$(scripts/kvm-here 2>/dev/null && echo on || echo off) \
		cargo test --locked -p twostage-iommufd-preload
	scripts/check/examples
	scripts/check/iommufd-selftests
	@$(MAKE) --no-print-directory nested-check
	@scripts/kvm-here || [ "$(KVM)" = off ]

# TSAN=off skips make tsan.
test-all: test loom
	@[ "$(TSAN)" = off ] || scripts/check/tsan
	TWOSTAGE_KVM=$(KVM) PROPTEST_CASES=4096 TWOSTAGE_STRESS_SECONDS=60 \
		cargo test --locked --release -- --include-ignored
	PROPTEST_CASES=10000 \
		cargo test --locked --release -p twostage-tests --test two_stages restored_lives
	scripts/check/api-count
	scripts/package
	scripts/check/guest-under-qemu
	@NESTED=$(NESTED) KVM=$(KVM) scripts/check/jail-minimal
	@$(MAKE) --no-print-directory qemu-demo
	@NESTED=$(NESTED) scripts/check/linux-checks --rounds 100000
	@[ "$(NESTED)" = off ] || scripts/check/bad-inputs
	@[ "$(NESTED)" = off ] || scripts/check/xen
	@[ "$(NESTED)" = off ] || scripts/check/xen --host-iommu intel
	@[ "$(NESTED)" = off ] || scripts/check/xen --host-iommu amd
	@[ "$(NESTED)" = off ] || scripts/nested/x86-kernel --from-source >/dev/null
	@$(MAKE) --no-print-directory test-x86-host
	@$(MAKE) --no-print-directory test-arm64

# PCs: a real /dev/iommu in a Linux that twostage runs, in nested KVM if necessary; and those of Linux
# behind QEMU's IOMMUs.
test-x86-host: binary
	@NESTED=$(NESTED) scripts/check/linux-checks-x86-host

# arm64: a real /dev/iommu in a machine that QEMU emulates.
test-arm64: binary-arm64
	@NESTED=$(NESTED) scripts/check/linux-checks-arm64

# If this machine's KVM cannot run Linux, the small guest runs in the nested host, too.
nested-check: guest binary
	@[ "$(NESTED)" = off ] || $(binary) probe --report line || \
		scripts/nested/x86_64 --timeout 600 -- run $(demo_flags) </dev/null
	@NESTED=$(NESTED) scripts/check/linux-checks

preload:
	@$(need) cc cargo
	cargo build --release --locked -p twostage-iommufd-preload
	@echo 'built target/release/libtwostage_iommufd.so; set LD_PRELOAD to it'

# NESTED=off skips Linux.
qemu-demo:
	@$(need) cc cargo make gcc objcopy
	@scripts/check/qemu-demo $$([ "$(NESTED)" = off ] && echo --no-linux)

package:
	@scripts/package

selftests:
	@scripts/check/iommufd-selftests

bench:
	@$(need) cc cargo
	cargo bench --locked
	cargo build --release --locked -p twostage-vmm
	@! scripts/kvm-here || scripts/bench/side-core
	@! scripts/kvm-here || scripts/bench/jail
	scripts/bench/compare-with-qemu
	scripts/bench/compare-with-qemu --mirrors
	@$(MAKE) --no-print-directory compare-arm64

# The calls of twostage and QEMU to Linux's /dev/iommu for the same arm64 guest.
compare-arm64: binary-arm64
	scripts/bench/compare-with-qemu-arm64

fuzz:
	@$(need) cc c++ cargo
	scripts/check/fuzz run $(or $(TARGET),all) $(or $(RUNS),1000000)

fuzz-all:
	@$(need) cc c++ cargo
	scripts/check/fuzz share $(or $(SECONDS),600)

# A separate target directory, as --cfg loom applies to all dependencies.
loom:
	@$(need) cc cargo
	RUSTFLAGS='--cfg loom' CARGO_TARGET_DIR=target/loom \
		cargo test --locked -p twostage-emulated --lib gate::model

tsan:
	@scripts/check/tsan

lint:
	@$(need) cc cargo rustfmt cargo-clippy
	cargo fmt --all --check
	cargo test --locked --quiet -p twostage-tests --test house
	cargo clippy --locked --workspace --all-targets -- -D warnings
	@# Without the features that other packages enable.
	cargo clippy --locked -p twostage -- -D warnings
	cargo clippy --locked -p twostage-vmm -- -D warnings
	cargo clippy --locked -p twostage-emulated -p twostage-iommufd-preload --all-targets \
		--features selftest -- -D warnings
	@ARM64=$(ARM64) scripts/check/lint-arm64
	@# The fuzzers' programs compile. Nothing is linked, so libFuzzer is not built.
	CUSTOM_LIBFUZZER_PATH=./none cargo check --locked -p twostage-fuzz --features libfuzzer
	RUSTDOCFLAGS='-D warnings' cargo doc --locked --no-deps --workspace --exclude twostage-fuzz --quiet
	@# As docs.rs does.
	RUSTDOCFLAGS='-D warnings' \
		cargo doc --locked --no-deps --all-features --quiet -p twostage -p twostage-emulated
	@# Two methods per field that nobody looks for: src/bits hides them.
	test -d $${CARGO_TARGET_DIR:-target}/doc/twostage
	! grep -qr "id=\"method\.[a-z0-9_]*_checked\"" $${CARGO_TARGET_DIR:-target}/doc/twostage
	scripts/check/cargo-deny --log-level error check licenses bans sources
	@# A mutation whose line is gone tests nothing.
	scripts/check/mutate-invalidations --lines

doc:
	@$(need) cc cargo
	RUSTDOCFLAGS='-D warnings' \
		cargo doc --locked --no-deps --all-features -p twostage -p twostage-emulated
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

.PHONY: help run demo test test-all test-x86-host test-arm64 nested-check preload qemu-demo package \
	selftests bench compare-arm64 fuzz fuzz-all loom tsan lint doc guest binary binary-arm64 kvm clean
.DEFAULT_GOAL := help
