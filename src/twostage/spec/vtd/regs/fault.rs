// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Fault status, events and records (§11.4.7).

use bitfield_struct::bitfield;

use crate::spec::vtd::PAGE_SHIFT;

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
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
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
