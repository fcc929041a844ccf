// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Arbitrary changes of snapshots, which are then restored. See the library.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| twostage_fuzz::states::run(bytes));
