// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Arbitrary command lines. See the library.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| twostage_fuzz::config::run(bytes));
