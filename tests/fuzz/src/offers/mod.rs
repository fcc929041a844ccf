// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What a host says of its IOMMUs, decoded from bytes, and what a virtual IOMMU offers because of
//! it.
//!
//! Registers may have any value: a guest is offered what every unit has ([`common`]), and never
//! more. Devices of an emulated host are as they were configured, whatever is asked ([`host`]), and
//! nothing of the question is left.

mod common;
mod host;
mod registers;
mod report;

use crate::input::Input;

/// One execution: see the [module's documentation](self).
pub fn run(bytes: &[u8]) {
    let mut input = Input::new(bytes);
    match input.byte() % 4 {
        0 => common::vtd(&mut input),
        1 => common::smmuv3(&mut input),
        2 => report::raw(&mut input),
        _ => host::survey(&mut input),
    }
}

/// One bit of `bits`.
fn bit(bits: u64, number: u32) -> bool {
    bits >> number & 1 != 0
}

/// `usual`, or with a few of its bits changed, or anything.
fn near(input: &mut Input<'_>, usual: u64) -> u64 {
    match input.byte() % 8 {
        0..=2 => usual,
        3..=6 => (0..input.byte() % 4 + 1).fold(usual, |word, _| word ^ 1 << (input.byte() % 64)),
        _ => input.number(),
    }
}
