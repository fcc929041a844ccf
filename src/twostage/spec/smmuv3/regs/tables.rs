// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The address of the stream table: STRTAB_BASE, STRTAB_BASE_CFG (§6.3).

use bitfield_struct::bitfield;

/// Stream table base register.
#[bitfield(u64)]
#[derive(PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub struct StrtabBase {
    #[bits(6)]
    __: u8,
    /// ADDR, in 64 bytes.
    #[bits(46)]
    pub addr: u64,
    #[bits(10)]
    __: u16,
    /// RA: read-allocate hint.
    pub ra: bool,
    #[bits(1)]
    __: u8,
}

impl StrtabBase {
    /// Bits that software can write.
    pub const WRITABLE: u64 = 0x400f_ffff_ffff_ffc0;

    /// The address, in bytes. Bits below the size of the table are ignored.
    pub const fn address(self) -> u64 {
        self.addr() << 6
    }
}

/// The format of the stream table ([`StrtabBaseCfg::fmt`]).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum StrtabFormat {
    /// 0: one table of entries.
    Linear,
    /// 1: a table of descriptors of tables of `2^split` entries.
    TwoLevel,
    /// 2, 3.
    Reserved,
}

/// Stream table base configuration register.
#[bitfield(u32)]
#[derive(PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub struct StrtabBaseCfg {
    /// LOG2SIZE: binary logarithm of the number of StreamIDs that the table covers.
    #[bits(6)]
    pub log2size: u8,
    /// SPLIT: bits of a StreamID that index the second level: 6, 8 or 10.
    #[bits(5)]
    pub split: u8,
    #[bits(5)]
    __: u8,
    /// FMT; see [`StrtabBaseCfg::format`].
    #[bits(2)]
    pub fmt: u8,
    #[bits(14)]
    __: u16,
}

impl StrtabBaseCfg {
    /// Bits that software can write.
    pub const WRITABLE: u32 = 0x3_07ff;

    /// Decodes FMT.
    pub const fn format(self) -> StrtabFormat {
        match self.fmt() {
            0 => StrtabFormat::Linear,
            1 => StrtabFormat::TwoLevel,
            _ => StrtabFormat::Reserved,
        }
    }

    /// The effective SPLIT: reserved values behave as 6.
    pub const fn effective_split(self) -> u8 {
        match self.split() {
            split @ (8 | 10) => split,
            _ => 6,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_stand_where_the_specification_puts_them() {
        let all = StrtabBase::new().with_addr((1 << 46) - 1).with_ra(true);
        assert_eq!(all.into_bits(), StrtabBase::WRITABLE);
        assert_eq!(StrtabBase::from_bits(u64::MAX).address(), 0x000f_ffff_ffff_ffc0);
        let all = StrtabBaseCfg::new().with_log2size(63).with_split(31).with_fmt(3);
        assert_eq!(all.into_bits(), StrtabBaseCfg::WRITABLE);
        let linux = StrtabBaseCfg::from_bits(1 << 16 | 8 << 6 | 16);
        assert_eq!((linux.format(), linux.effective_split()), (StrtabFormat::TwoLevel, 8));
        assert_eq!(linux.log2size(), 16);
        assert_eq!(StrtabBaseCfg::new().with_split(7).effective_split(), 6);
        assert_eq!(StrtabBaseCfg::new().with_fmt(2).format(), StrtabFormat::Reserved);
    }
}
