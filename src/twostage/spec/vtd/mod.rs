// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Intel VT-d: registers, tables, descriptors and faults.
//!
//! Source: Intel Virtualization Technology for Directed I/O, Architecture Specification, revisions
//! 4 and 5; section numbers are those of revision 4. Fields have the specification's names. All
//! words are little-endian in memory; values here are in host order.

pub mod fault;
pub mod first_stage;
pub mod interrupt;
mod page_range;
pub mod pasid;
pub mod qi;
pub mod regs;
pub mod root;
pub mod second_stage;

pub use page_range::PageRange;

/// Size of a table and of the smallest page, in bytes.
pub const PAGE_SIZE: u64 = 1 << PAGE_SHIFT;
/// Binary logarithm of [`PAGE_SIZE`].
pub const PAGE_SHIFT: u32 = 12;

/// The widest host address width (HAW) in bits: the maximum that a paging entry can hold (§9.7,
/// §9.8), so that no address bit of an entry is reserved. The virtual and the emulated VT-d both
/// have it.
pub const HOST_ADDRESS_WIDTH: u8 = 52;

/// The bits of a 64-bit word at and above `host_address_width`, up to bit 63 for table pointers:
/// reserved in each pointer to host memory.
pub const fn above_width(host_address_width: u8) -> u64 {
    if host_address_width >= 64 {
        return 0;
    }
    !((1 << host_address_width) - 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bits_above_a_width() {
        assert_eq!(above_width(64), 0);
        assert_eq!(above_width(48), 0xffff_0000_0000_0000);
        assert_eq!(above_width(0), u64::MAX);
    }
}
