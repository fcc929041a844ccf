// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What fuzzers share: the guest's memory with its past, every way in which a naive walk of tables
//! may come out, DMA beside the guest, MSI-X, threads, and who takes interrupts.

pub mod beside;
pub mod memory;
pub mod msix;
pub mod oracle;
pub mod threads;

use std::sync::OnceLock;

use twostage::viommu::smmuv3::{SmmuInterrupt, SmmuInterrupts};
use twostage::viommu::InterruptSink;

/// The step that `number` stands for: in order, each of `steps` for as many numbers as it says, and
/// again after the last.
pub fn weighted<S: Copy>(steps: &[(S, u8)], number: u8) -> S {
    let all = steps.iter().flat_map(|(step, weight)| (0..*weight).map(|_| *step));
    all.cycle().nth(number.into()).expect("some step has a weight")
}

/// Prints what happens if `TWOSTAGE_FUZZ_TRACE` is set: to see what an input does.
pub fn trace(what: impl FnOnce() -> String) {
    static ASKED: OnceLock<bool> = OnceLock::new();
    if *ASKED.get_or_init(|| std::env::var_os("TWOSTAGE_FUZZ_TRACE").is_some()) {
        eprintln!("{}", what());
    }
}

/// Takes interrupts, of either architecture, and does nothing.
pub struct Quiet;

impl InterruptSink for Quiet {
    fn send_msi(&self, _: u64, _: u32) {}
}

impl SmmuInterrupts for Quiet {
    fn message(&self, _: u64, _: u32) -> bool {
        true
    }

    fn wire(&self, _: SmmuInterrupt) {}
}
