// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What a host says of its IOMMUs, and what a virtual one offers because of it. See the library.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| twostage_fuzz::offers::run(bytes));
