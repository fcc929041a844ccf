// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! An arm64 machine's interrupt controllers, all in the kernel.

mod chip;
mod lines;

pub use chip::IrqChip;
pub(crate) use lines::{EdgeLine, Lines};
