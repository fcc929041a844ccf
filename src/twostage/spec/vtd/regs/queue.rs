// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Registers of the invalidation queue (§11.4.9) and the page request queue (§11.4.11).

use bitfield_struct::bitfield;

use crate::spec::vtd::PAGE_SHIFT;

/// Head or tail of a queue: IQH, IQT (§11.4.9), PQH, PQT (§11.4.11).
#[bitfield(u64)]
#[derive(PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub struct QueuePointer {
    #[bits(4)]
    __: u8,
    /// Offset into the queue, in 16 bytes. Bit 0 must be 0 where descriptors have 256 bits.
    #[bits(15)]
    pub index: u16,
    #[bits(45)]
    __: u64,
}

impl QueuePointer {
    /// Bits that software can write, where it can write any.
    pub const WRITABLE: u64 = 0x7_fff0;

    /// Offset into the queue, in bytes.
    pub const fn offset(self) -> u64 {
        (self.index() as u64) << 4
    }

    /// The pointer to `offset` bytes; the bits that the register cannot hold are dropped.
    pub const fn from_offset(offset: u64) -> Self {
        Self::new().with_index((offset >> 4) as u16 & 0x7fff)
    }
}

/// Invalidation queue address register (§11.4.9).
#[bitfield(u64)]
#[derive(PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub struct Iqa {
    /// QS: the queue has `2^qs` pages of 4 KiB.
    #[bits(3)]
    pub qs: u8,
    __: u8,
    /// DW: descriptors have 256 bits, not 128.
    pub dw: bool,
    /// IQA: address of the queue, in 4 KiB pages.
    #[bits(52)]
    pub iqa: u64,
}

impl Iqa {
    /// Bits that software can write.
    pub const WRITABLE: u64 = !0x7f8;

    /// GPA of the queue, in bytes.
    pub const fn base(self) -> u64 {
        self.iqa() << PAGE_SHIFT
    }

    /// Size of the queue, in bytes.
    pub const fn size(self) -> u64 {
        1 << (PAGE_SHIFT + self.qs() as u32)
    }

    /// Size of a descriptor, in bytes.
    pub const fn descriptor_size(self) -> u64 {
        if self.dw() {
            32
        } else {
            16
        }
    }
}

/// Why the invalidation queue stopped (IQERCD.IQEI).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum IqErrorInfo {
    /// 1: the tail is beyond the queue.
    InvalidTail,
    /// 2: the descriptor could not be read.
    FetchError,
    /// 3: the type of the descriptor is not supported.
    InvalidType,
    /// 4: a reserved field of the descriptor is set.
    ReservedField,
    /// 5: the descriptor width (IQA.DW) is not allowed.
    InvalidWidth,
    /// 6: the tail is not aligned to the descriptor width.
    TailMisaligned,
    /// 7: the translation table mode (RTADDR.TTM) is not allowed.
    InvalidTtm,
}

impl IqErrorInfo {
    /// The four bits of IQEI.
    pub const fn code(self) -> u8 {
        match self {
            Self::InvalidTail => 1,
            Self::FetchError => 2,
            Self::InvalidType => 3,
            Self::ReservedField => 4,
            Self::InvalidWidth => 5,
            Self::TailMisaligned => 6,
            Self::InvalidTtm => 7,
        }
    }

    /// What `code` stands for; `None` for 0 (no information) and the reserved codes.
    pub const fn from_code(code: u8) -> Option<Self> {
        Some(match code {
            1 => Self::InvalidTail,
            2 => Self::FetchError,
            3 => Self::InvalidType,
            4 => Self::ReservedField,
            5 => Self::InvalidWidth,
            6 => Self::TailMisaligned,
            7 => Self::InvalidTtm,
            _ => return None,
        })
    }
}

/// Invalidation queue error record register (§11.4.9); read-only.
#[bitfield(u64)]
#[derive(PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub struct Iqercd {
    /// IQEI: why the queue stopped, while FSTS.IQE; see [`IqErrorInfo`].
    #[bits(4)]
    pub iqei: u8,
    #[bits(28)]
    __: u32,
    /// ITESID: whose device-TLB invalidation timed out, while FSTS.ITE.
    pub itesid: u16,
    /// ICESID: source of the unexpected completion, while FSTS.ICE is set.
    pub icesid: u16,
}

/// Invalidation completion status register (§11.4.9).
#[bitfield(u32)]
#[derive(PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub struct Ics {
    /// IWC: a wait descriptor with IF is complete. RW1C.
    pub iwc: bool,
    #[bits(31)]
    __: u32,
}

/// Page request queue address register (§11.4.11).
#[bitfield(u64)]
#[derive(PartialEq, Eq)]
pub struct Pqa {
    /// PQS: the queue has `2^pqs` pages of 4 KiB.
    #[bits(3)]
    pub pqs: u8,
    #[bits(9)]
    __: u16,
    /// PQA: address of the queue, in 4 KiB pages.
    #[bits(52)]
    pub pqa: u64,
}

/// Page request status register (§11.4.11).
#[bitfield(u32)]
#[derive(PartialEq, Eq)]
pub struct Prs {
    /// PPR: a page request is pending. RW1C.
    pub ppr: bool,
    /// PRO: the page request queue overflowed. RW1C.
    pub pro: bool,
    #[bits(30)]
    __: u32,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_stand_where_the_specification_puts_them() {
        assert_eq!(QueuePointer::from_offset(0x7_fff0).into_bits(), 0x7_fff0);
        assert_eq!(QueuePointer::from_bits(u64::MAX).offset(), QueuePointer::WRITABLE);
        let all = Iqa::new().with_qs(7).with_dw(true).with_iqa((1 << 52) - 1);
        assert_eq!(all.into_bits(), Iqa::WRITABLE);
        let iqa = Iqa::from_bits(0x1234_5801);
        assert_eq!((iqa.base(), iqa.size()), (0x1234_5000, 0x2000));
        assert_eq!((iqa.dw(), iqa.descriptor_size()), (true, 32));
        assert_eq!(Iqercd::new().with_icesid(0xffff).into_bits(), 0xffff << 48);
        assert_eq!(Prs::new().with_pro(true).into_bits(), 2);
    }

    #[test]
    fn queue_errors_round_trip() {
        for code in 0..16 {
            assert_eq!(
                IqErrorInfo::from_code(code).map_or(0, |e| e.code()),
                code * u8::from(code < 8)
            );
        }
    }
}
