// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Layouts from the public specifications, typed: registers, table entries, descriptors, faults.
//!
//! Layouts only: no algorithms and no `unsafe`. No other code of the crate shifts and masks.

pub mod pci;
pub mod smmuv3;
pub mod vtd;
