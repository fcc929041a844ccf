// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What a guest does to a virtual VT-d, compared with a naive model of it. See the library.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| twostage_fuzz::vtd::run(bytes));
