// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Arbitrary ioctls, DMA and changes of memory, in any order, to the emulated host. See the
//! library.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| twostage_fuzz::ioctls::run(bytes));
