// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Registers of the invalidation queue (§11.4.9) and the page request queue (§11.4.11); fault
//! status, events and records (§11.4.7).

use twostage_bits::bitfield;

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
#[non_exhaustive]
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
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
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

impl Pqa {
    /// Bits that software can write.
    pub const WRITABLE: u64 = !0xff8;

    /// GPA of the queue, in bytes.
    pub const fn base(self) -> u64 {
        self.pqa() << PAGE_SHIFT
    }

    /// Size of the queue, in bytes.
    pub const fn size(self) -> u64 {
        1 << (PAGE_SHIFT + self.pqs() as u32)
    }
}

/// Page request status register (§11.4.11).
#[bitfield(u32)]
#[derive(PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub struct Prs {
    /// PPR: a page request is pending. RW1C.
    pub ppr: bool,
    /// PRO: the page request queue overflowed. RW1C.
    pub pro: bool,
    #[bits(30)]
    __: u32,
}

/// Fault status register (§11.4.7).
#[bitfield(u32)]
#[derive(PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub struct Fsts {
    /// PFO: a fault was lost because the next record was in use. RW1C.
    pub pfo: bool,
    /// PPF: a record is in use. Read-only.
    pub ppf: bool,
    /// AFO: advanced fault log overflow. RW1C.
    pub afo: bool,
    /// APF: advanced fault log holds a fault. RW1C.
    pub apf: bool,
    /// IQE: invalidation queue error. RW1C.
    pub iqe: bool,
    /// ICE: invalidation completion error. RW1C.
    pub ice: bool,
    /// ITE: invalidation time-out error. RW1C.
    pub ite: bool,
    #[bits(1)]
    __: u8,
    /// FRI: index of the first record in use, while PPF is set. Read-only.
    pub fri: u8,
    __: u16,
}

/// Control of an event: FECTL (§11.4.7), IECTL (§11.4.9), PECTL (§11.4.11).
#[bitfield(u32)]
#[derive(PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub struct EventControl {
    #[bits(30)]
    __: u32,
    /// IP: an interrupt is held back. Read-only.
    pub ip: bool,
    /// IM: interrupts are held back.
    pub im: bool,
}

/// Low 64 bits of a fault recording register (§11.4.7).
#[bitfield(u64)]
#[derive(PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub struct FaultRecordLow {
    #[bits(12)]
    __: u16,
    /// FI: page number of the faulting address; for an interrupt, see
    /// [`FaultRecordLow::interrupt_index`].
    #[bits(52)]
    pub fi: u64,
}

impl FaultRecordLow {
    /// Where the interrupt index starts in FI: it is bits 63:48 of the word.
    const INDEX_SHIFT: u32 = 48 - PAGE_SHIFT;

    /// FI of an interrupt whose table entry is `index`.
    pub const fn of_interrupt(index: u16) -> Self {
        Self::new().with_fi((index as u64) << Self::INDEX_SHIFT)
    }

    /// The table entry of an interrupt, for the reasons 20h to 28h.
    pub const fn interrupt_index(self) -> u16 {
        (self.fi() >> Self::INDEX_SHIFT) as u16
    }
}

/// High 64 bits of a fault recording register (§11.4.7).
#[bitfield(u64)]
#[derive(PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub struct FaultRecordHigh {
    /// SID: who made the request.
    pub sid: u16,
    #[bits(12)]
    __: u16,
    /// T2: with T1, the type of the request.
    pub t2: bool,
    /// PRIV: supervisor privilege was asked for; valid with PP.
    pub privileged: bool,
    /// EXE: execution was asked for; valid with PP.
    pub exe: bool,
    /// PP: the request had a PASID.
    pub pp: bool,
    /// FR: fault reason; see [`crate::spec::vtd::fault::FaultReason`].
    pub fr: u8,
    /// PV: the PASID, with PP.
    #[bits(20)]
    pub pv: u32,
    /// AT: address type of the request.
    #[bits(2)]
    pub at: u8,
    /// T1: `T1 T2` = 00 write, 10 read, 11 atomic, 01 page request.
    pub t1: bool,
    /// F: the record is in use. RW1C.
    pub f: bool,
}

/// A fault recording register (FRCD, §11.4.7): 128 bits.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[cfg_attr(
    feature = "serde",
    derive(serde::Serialize, serde::Deserialize),
    serde(deny_unknown_fields)
)]
pub struct FaultRecord {
    /// Bits 63:0.
    pub low: FaultRecordLow,
    /// Bits 127:64.
    pub high: FaultRecordHigh,
}

impl FaultRecord {
    /// The faulting address, in bytes, of its page.
    pub const fn address(self) -> u64 {
        self.low.fi() << PAGE_SHIFT
    }

    /// The record that `words` hold.
    pub const fn from_words(words: [u64; 2]) -> Self {
        Self {
            low: FaultRecordLow::from_bits(words[0]),
            high: FaultRecordHigh::from_bits(words[1]),
        }
    }

    /// The words of the record.
    pub const fn to_words(self) -> [u64; 2] {
        [self.low.into_bits(), self.high.into_bits()]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    mod queue {
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
            let all = Pqa::new().with_pqs(7).with_pqa((1 << 52) - 1);
            assert_eq!((all.into_bits(), all.size()), (Pqa::WRITABLE, 128 << 12));
            assert_eq!(Pqa::from_bits(0x1234_5001).base(), 0x1234_5000);
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

    mod fault {
        use super::*;

        #[test]
        fn fields_stand_where_the_specification_puts_them() {
            assert_eq!(Fsts::new().with_fri(0xff).into_bits(), 0xff00);
            assert_eq!(Fsts::new().with_iqe(true).into_bits(), 1 << 4);
            assert_eq!(Fsts::new().with_ite(true).into_bits(), 1 << 6);
            assert_eq!(EventControl::new().with_im(true).into_bits(), 1 << 31);
            assert_eq!(FaultRecordHigh::new().with_t2(true).into_bits(), 1 << 28);
            assert_eq!(FaultRecordHigh::new().with_exe(true).into_bits(), 1 << 30);
            assert_eq!(FaultRecordHigh::new().with_pp(true).into_bits(), 1 << 31);
            assert_eq!(FaultRecordHigh::new().with_fr(0xff).into_bits(), 0xff << 32);
            assert_eq!(FaultRecordHigh::new().with_pv(0xf_ffff).into_bits(), 0xf_ffff << 40);
            assert_eq!(FaultRecordHigh::new().with_t1(true).into_bits(), 1 << 62);
            assert_eq!(FaultRecordLow::of_interrupt(0xffff).into_bits(), 0xffff << 48);
            assert_eq!(FaultRecordLow::of_interrupt(0x1234).interrupt_index(), 0x1234);
            let words = [0x1234_5000, 1 << 63 | 0x42];
            assert_eq!(FaultRecord::from_words(words).to_words(), words);
            assert_eq!(FaultRecord::from_words(words).address(), 0x1234_5000);
        }
    }
}
