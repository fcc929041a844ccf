// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What others can do to the library and the VMM, decoded from bytes: each target is a function of
//! bytes that panics if anything is wrong.
//!
//! `make fuzz` runs them with libFuzzer, which finds bytes that reach more and more code. The seeds
//! in `seeds` are what it found, and every finding; `make test` runs these without it. An input is
//! structured: numbers that are often meaningful, in an order that a target decodes as steps.
#![forbid(unsafe_code)]

pub mod config;
mod input;
pub mod ioctls;
pub mod loaders;
pub mod memory;
mod models;
pub mod offers;
pub mod pci;
pub mod preload;
pub mod smmuv3;
pub mod states;
pub mod vfio;
pub mod virtio;
pub mod vtd;

/// A target: its name, which is that of its folder of seeds, and one execution.
pub type Target = (&'static str, fn(&[u8]));

/// Every target.
pub const TARGETS: &[Target] = &[
    ("config", config::run),
    ("ioctls", ioctls::run),
    ("loaders", loaders::run),
    ("memory", memory::run),
    ("offers", offers::run),
    ("pci", pci::run),
    ("preload", preload::run),
    ("smmuv3", smmuv3::run),
    ("states", states::run),
    ("vfio", vfio::run),
    ("virtio", virtio::run),
    ("vtd", vtd::run),
];
