// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The circular queues: base, indices with wrap and overflow flags, errors (§3.5, §6.3, §7.1).

use twostage_bits::bitfield;

/// Size of a command, in bytes.
pub const COMMAND_SIZE: u64 = 16;

/// The maximum of [`QueueBase::log2size`]: indices have so many bits, and one for the wrap.
pub const MAX_LOG2SIZE: u8 = 19;

/// CMDQ_BASE, EVENTQ_BASE, PRIQ_BASE.
#[bitfield(u64)]
#[derive(PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub struct QueueBase {
    /// LOG2SIZE: binary logarithm of the number of entries.
    #[bits(5)]
    pub log2size: u8,
    /// ADDR, in 32 bytes.
    #[bits(47)]
    pub addr: u64,
    #[bits(10)]
    __: u16,
    /// RA or WA: allocation hint.
    pub allocate: bool,
    #[bits(1)]
    __: u8,
}

impl QueueBase {
    /// Bits that software can write.
    pub const WRITABLE: u64 = 0x400f_ffff_ffff_ffff;

    /// The queue of entries of `entry_size` bytes, of at most `2^max_log2size` of them, which is at
    /// most [`MAX_LOG2SIZE`].
    pub fn layout(self, entry_size: u64, max_log2size: u8) -> QueueLayout {
        let log2size = self.log2size().min(max_log2size).min(MAX_LOG2SIZE);
        // The queue is aligned to its size: lower address bits are ignored.
        let size = entry_size << log2size;
        QueueLayout { base: self.addr() << 5 & !(size - 1), log2size, entry_size }
    }
}

/// The address of a queue and the arithmetic of its indices.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct QueueLayout {
    base: u64,
    log2size: u8,
    entry_size: u64,
}

impl QueueLayout {
    /// Number of entries.
    pub const fn entries(self) -> u32 {
        1 << self.log2size
    }

    /// `index` without the bits above its wrap bit.
    pub const fn truncate(self, index: u32) -> u32 {
        index & ((2 << self.log2size) - 1)
    }

    /// The index after `index`; past the last entry it wraps.
    pub const fn next(self, index: u32) -> u32 {
        self.truncate(index.wrapping_add(1))
    }

    /// Physical address of entry `index`, in bytes.
    pub const fn address(self, index: u32) -> u64 {
        // 52 bits of base, aligned to the size of the queue: no carry.
        self.base + (index & (self.entries() - 1)) as u64 * self.entry_size
    }

    /// Number of entries from `cons` to `prod`: above [`QueueLayout::entries`] if these indices are
    /// impossible.
    pub const fn used(self, prod: u32, cons: u32) -> u32 {
        self.truncate(prod.wrapping_sub(cons))
    }

    /// Whether the queue is empty.
    pub const fn is_empty(self, prod: u32, cons: u32) -> bool {
        self.used(prod, cons) == 0
    }

    /// Whether the queue is full.
    pub const fn is_full(self, prod: u32, cons: u32) -> bool {
        self.used(prod, cons) >= self.entries()
    }
}

/// CMDQ_PROD.
#[bitfield(u32)]
#[derive(PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub struct CmdqProd {
    /// WR: write index, with its wrap bit above it.
    #[bits(20)]
    pub wr: u32,
    #[bits(12)]
    __: u16,
}

/// CMDQ_CONS.
#[bitfield(u32)]
#[derive(PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub struct CmdqCons {
    /// RD: read index, with its wrap bit above it.
    #[bits(20)]
    pub rd: u32,
    #[bits(4)]
    __: u8,
    /// ERR: why consumption stopped, while GERROR.CMDQ_ERR is active; see [`CommandError`].
    #[bits(7)]
    pub err: u8,
    #[bits(1)]
    __: u8,
}

/// EVENTQ_PROD, PRIQ_PROD.
#[bitfield(u32)]
#[derive(PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub struct OutputProd {
    /// WR: write index, with its wrap bit above it.
    #[bits(20)]
    pub wr: u32,
    #[bits(11)]
    __: u16,
    /// OVFLG: toggled when an entry is lost; an overflow is unacknowledged while it differs from
    /// [`OutputCons::ovackflg`].
    pub ovflg: bool,
}

/// EVENTQ_CONS, PRIQ_CONS.
#[bitfield(u32)]
#[derive(PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub struct OutputCons {
    /// RD: read index, with its wrap bit above it.
    #[bits(20)]
    pub rd: u32,
    #[bits(11)]
    __: u16,
    /// OVACKFLG: the overflow flag as acknowledged by software.
    pub ovackflg: bool,
}

/// Why command consumption stopped (CMDQ_CONS.ERR, §7.1).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, thiserror::Error)]
#[non_exhaustive]
pub enum CommandError {
    /// 1, CERROR_ILL: the command is illegal or unsupported.
    #[error("CERROR_ILL")]
    Illegal,
    /// 2, CERROR_ABT: the command could not be fetched.
    #[error("CERROR_ABT")]
    Abort,
    /// 3, CERROR_ATC_INV_SYNC: a CMD_ATC_INV before this CMD_SYNC timed out.
    #[error("CERROR_ATC_INV_SYNC")]
    AtcInvSync,
}

impl CommandError {
    /// The code in CMDQ_CONS.ERR.
    pub const fn code(self) -> u8 {
        match self {
            Self::Illegal => 1,
            Self::Abort => 2,
            Self::AtcInvSync => 3,
        }
    }

    /// Decodes `code`; `None` for 0 (CERROR_NONE) and the reserved codes.
    pub const fn from_code(code: u8) -> Option<Self> {
        Some(match code {
            1 => Self::Illegal,
            2 => Self::Abort,
            3 => Self::AtcInvSync,
            _ => return None,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::spec::smmuv3::event::EVENT_SIZE;
    use proptest::prelude::*;

    #[test]
    fn fields_stand_where_the_specification_puts_them() {
        let all = QueueBase::new().with_log2size(31).with_addr((1 << 47) - 1).with_allocate(true);
        assert_eq!(all.into_bits(), QueueBase::WRITABLE);
        assert_eq!(CmdqCons::new().with_rd(1).with_err(2).into_bits(), 2 << 24 | 1);
        assert_eq!(OutputProd::new().with_wr(3).with_ovflg(true).into_bits(), 1 << 31 | 3);
        assert_eq!(OutputCons::new().with_ovackflg(true).into_bits(), 1 << 31);
        assert_eq!(CmdqProd::from_bits(u32::MAX).wr(), 0xf_ffff);
    }

    #[test]
    fn errors_round_trip() {
        for code in 0..8 {
            let known = CommandError::from_code(code).map_or(0, CommandError::code);
            assert_eq!(known, if code < 4 { code } else { 0 });
        }
    }

    #[test]
    fn a_queue_is_aligned_to_its_size_and_clamped() {
        let base = QueueBase::from_bits(0x1234_5660 | 4);
        let layout = base.layout(COMMAND_SIZE, 19);
        assert_eq!((layout.entries(), layout.address(0)), (16, 0x1234_5600));
        assert_eq!((layout.address(15), layout.address(17)), (0x1234_56f0, 0x1234_5610));
        assert_eq!(QueueBase::from_bits(31).layout(EVENT_SIZE, 19).entries(), 1 << 19);
        assert_eq!(QueueBase::from_bits(31).layout(EVENT_SIZE, 31).entries(), 1 << 19);
        assert_eq!(QueueBase::from_bits(9).layout(COMMAND_SIZE, 8).entries(), 256);
        let one = QueueBase::from_bits(0).layout(COMMAND_SIZE, 8);
        assert_eq!((one.entries(), one.next(0), one.next(1)), (1, 1, 0));
        assert!(one.is_full(1, 0) && one.is_empty(1, 1));
    }

    #[test]
    fn indices_that_no_queue_can_have_are_told() {
        let layout = QueueBase::from_bits(4).layout(COMMAND_SIZE, 19);
        assert_eq!(layout.used(16, 0), 16);
        assert_eq!(layout.used(17, 0), 17);
        assert_eq!(layout.used(0, 1), 31);
    }

    proptest! {
        #[test]
        fn what_is_produced_is_consumed(
            log2size in 0..20u64,
            start in any::<u32>(),
            steps in 0..100u32,
        ) {
            let layout = QueueBase::from_bits(log2size).layout(COMMAND_SIZE, 19);
            let cons = layout.truncate(start);
            let mut prod = cons;
            for step in 0..steps.min(layout.entries()) {
                prop_assert_eq!(layout.used(prod, cons), step);
                prop_assert!(!layout.is_full(prod, cons));
                prod = layout.next(prod);
            }
            prop_assert!(layout.address(prod) < layout.address(0) + (16 << log2size));
        }
    }
}
