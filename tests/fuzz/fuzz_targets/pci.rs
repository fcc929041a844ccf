// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Arbitrary accesses to PCI, interrupt routes and the IOAPIC. See the library.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| twostage_fuzz::pci::run(bytes));
