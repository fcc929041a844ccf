// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What a guest does to a virtual SMMUv3, compared with a naive model of it. See the library.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| twostage_fuzz::smmuv3::run(bytes));
