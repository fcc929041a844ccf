// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The two register pages (§6.2, §6.3): offsets, names and layouts.

mod control;
mod identification;
mod interrupt;
mod tables;

pub use control::{Cr0, Cr1, Cr2, Gbpa};
pub use identification::{Aidr, Idr0, Idr1, Idr3, Idr5, Iidr, STALL_NONE, ST_LEVEL_2, TTF_AARCH64};
pub use interrupt::{Gerror, IrqCfg0, IrqCtrl};
pub use tables::{StrtabBase, StrtabBaseCfg, StrtabFormat};

/// Size of a register page, in bytes.
pub const PAGE_SIZE: u64 = 0x1_0000;
/// Size of all register pages, in bytes.
pub const SIZE: u64 = 2 * PAGE_SIZE;

macro_rules! registers {
    ($($(#[$doc:meta])* $name:ident = $offset:literal, $size:literal;)*) => {
        $($(#[$doc])* pub const $name: u64 = $offset;)*

        /// Offset, size in bytes, name.
        const REGISTERS: &[(u64, u64, &str)] = &[$(($offset, $size, stringify!($name)),)*];
    };
}

registers! {
    /// Identification 0: features.
    IDR0 = 0x00, 4;
    /// Identification 1: sizes.
    IDR1 = 0x04, 4;
    /// Identification 2: address translation operations.
    IDR2 = 0x08, 4;
    /// Identification 3: more features.
    IDR3 = 0x0c, 4;
    /// Identification 4: of the implementation.
    IDR4 = 0x10, 4;
    /// Identification 5: address sizes and granules.
    IDR5 = 0x14, 4;
    /// Implementation.
    IIDR = 0x18, 4;
    /// Architecture version.
    AIDR = 0x1c, 4;
    /// Control 0: enables.
    CR0 = 0x20, 4;
    /// Control 0, as far as it has taken effect.
    CR0ACK = 0x24, 4;
    /// Control 1: memory attributes of tables and queues.
    CR1 = 0x28, 4;
    /// Control 2: behaviours.
    CR2 = 0x2c, 4;
    /// Status.
    STATUSR = 0x40, 4;
    /// Global bypass attributes: used while translation is disabled.
    GBPA = 0x44, 4;
    /// Alternate global bypass attributes.
    AGBPA = 0x48, 4;
    /// Interrupt enables.
    IRQ_CTRL = 0x50, 4;
    /// Interrupt enables, as far as they have taken effect.
    IRQ_CTRLACK = 0x54, 4;
    /// Global errors: an error is active while its bit differs from that in [`GERRORN`].
    GERROR = 0x60, 4;
    /// Global errors, as acknowledged.
    GERRORN = 0x64, 4;
    /// Address of the message for global errors.
    GERROR_IRQ_CFG0 = 0x68, 8;
    /// Data of the message for global errors.
    GERROR_IRQ_CFG1 = 0x70, 4;
    /// Memory attributes of the message for global errors.
    GERROR_IRQ_CFG2 = 0x74, 4;
    /// Stream table address.
    STRTAB_BASE = 0x80, 8;
    /// Stream table format and size.
    STRTAB_BASE_CFG = 0x88, 4;
    /// Command queue address and size.
    CMDQ_BASE = 0x90, 8;
    /// Command queue write index.
    CMDQ_PROD = 0x98, 4;
    /// Command queue read index, and why it stopped.
    CMDQ_CONS = 0x9c, 4;
    /// Event queue address and size.
    EVENTQ_BASE = 0xa0, 8;
    /// Address of the message for events.
    EVENTQ_IRQ_CFG0 = 0xb0, 8;
    /// Data of the message for events.
    EVENTQ_IRQ_CFG1 = 0xb8, 4;
    /// Memory attributes of the message for events.
    EVENTQ_IRQ_CFG2 = 0xbc, 4;
    /// PRI queue address and size.
    PRIQ_BASE = 0xc0, 8;
    /// Address of the message for page requests.
    PRIQ_IRQ_CFG0 = 0xd0, 8;
    /// Data of the message for page requests.
    PRIQ_IRQ_CFG1 = 0xd8, 4;
    /// Memory attributes of the message for page requests.
    PRIQ_IRQ_CFG2 = 0xdc, 4;
    /// Event queue write index, and overflow; page 1.
    EVENTQ_PROD = 0x1_00a8, 4;
    /// Event queue read index, and acknowledged overflow; page 1.
    EVENTQ_CONS = 0x1_00ac, 4;
    /// PRI queue write index, and overflow; page 1.
    PRIQ_PROD = 0x1_00c8, 4;
    /// PRI queue read index, and acknowledged overflow; page 1.
    PRIQ_CONS = 0x1_00cc, 4;
}

/// The name of the register at byte `offset`, for traces; `"reserved"` if there is none.
pub fn name(offset: u64) -> &'static str {
    let found = REGISTERS.iter().find(|&&(start, size, _)| (start..start + size).contains(&offset));
    found.map_or("reserved", |&(_, _, name)| name)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_byte_of_a_register_has_its_name() {
        assert_eq!((name(0), name(3), name(0x1c)), ("IDR0", "IDR0", "AIDR"));
        assert_eq!(
            (name(0x80), name(0x87), name(0x8c)),
            ("STRTAB_BASE", "STRTAB_BASE", "reserved")
        );
        assert_eq!((name(0x1_00a8), name(0xa8)), ("EVENTQ_PROD", "reserved"));
        assert_eq!(name(u64::MAX), "reserved");
    }

    #[test]
    fn registers_do_not_overlap() {
        for pair in REGISTERS.windows(2) {
            assert!(pair[0].0 + pair[0].1 <= pair[1].0, "{pair:x?}");
        }
    }

    #[test]
    fn registers_are_aligned_and_on_the_pages() {
        for (offset, size, name) in REGISTERS {
            assert!(offset.is_multiple_of(*size) && offset + size <= SIZE, "{name}");
        }
    }
}
