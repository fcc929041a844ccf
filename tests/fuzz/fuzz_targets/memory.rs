// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! How a VMM maps and unmaps guest memory, on a host whose verbs may fail. See the library.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| twostage_fuzz::memory::run(bytes));
