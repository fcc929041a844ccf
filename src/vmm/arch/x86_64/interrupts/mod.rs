// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A PC's interrupt controllers.
//!
//! Either PIC, IOAPIC and LAPICs are in the kernel; or only the LAPICs are, and the IOAPIC is here,
//! where a virtual IOMMU can remap its interrupts. Devices' MSIs are remapped in both cases.

mod chip;
mod ioapic;
mod lines;
mod pin_line;
mod redirection;

pub use chip::IrqChip;
pub use ioapic::Ioapic;
pub(crate) use lines::{EdgeLine, Lines};
