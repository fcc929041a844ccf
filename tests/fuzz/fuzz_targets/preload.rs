// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What a process can send to the preload library. See the library.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| twostage_fuzz::preload::run(bytes));
