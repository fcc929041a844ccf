// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Arbitrary assigned devices, and what guests do to them. See the library.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| twostage_fuzz::vfio::run(bytes));
