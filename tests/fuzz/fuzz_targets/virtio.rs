// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Arbitrary drivers of virtio devices. See the library.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| twostage_fuzz::virtio::run(bytes));
