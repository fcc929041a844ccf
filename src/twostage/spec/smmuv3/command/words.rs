// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The 64-bit words of the commands (§4).

use bitfield_struct::bitfield;

/// Word 0 of commands with a StreamID.
#[bitfield(u64)]
pub(super) struct StreamWord {
    pub opcode: u8,
    #[bits(1)]
    __: u8,
    /// G, of CMD_ATC_INV.
    pub global: bool,
    /// SSec: the stream is a Secure one.
    pub ssec: bool,
    /// SSV: the SubstreamID is valid.
    pub ssv: bool,
    #[bits(20)]
    pub substream: u32,
    pub stream: u32,
}

/// Word 0 of CMD_RESUME.
#[bitfield(u64)]
pub(super) struct ResumeWord {
    pub opcode: u8,
    #[bits(4)]
    __: u8,
    /// Ac, Ab.
    #[bits(2)]
    pub response: u8,
    #[bits(18)]
    __: u32,
    pub stream: u32,
}

/// Word 0 of CMD_TLBI_*.
#[bitfield(u64)]
pub(super) struct TlbiWord {
    pub opcode: u8,
    #[bits(4)]
    __: u8,
    #[bits(5)]
    pub num: u8,
    #[bits(3)]
    __: u8,
    #[bits(5)]
    pub scale: u8,
    #[bits(7)]
    __: u8,
    pub vmid: u16,
    pub asid: u16,
}

/// Word 1 of CMD_TLBI_* by address.
#[bitfield(u64)]
pub(super) struct TlbiAddress {
    pub leaf: bool,
    #[bits(7)]
    __: u8,
    #[bits(2)]
    pub ttl: u8,
    #[bits(2)]
    pub tg: u8,
    /// In 4 KiB.
    #[bits(52)]
    pub address: u64,
}

/// Word 1 of CMD_PREFETCH_ADDR.
#[bitfield(u64)]
pub(super) struct PrefetchWord {
    #[bits(5)]
    pub size: u8,
    #[bits(5)]
    pub stride: u8,
    #[bits(2)]
    __: u8,
    /// In 4 KiB.
    #[bits(52)]
    pub address: u64,
}

/// Word 1 of CMD_CFGI_STE and CMD_CFGI_CD.
#[bitfield(u64)]
pub(super) struct LeafWord {
    pub leaf: bool,
    #[bits(63)]
    __: u64,
}

/// Word 1 of CMD_CFGI_STE_RANGE.
#[bitfield(u64)]
pub(super) struct RangeWord {
    #[bits(5)]
    pub range: u8,
    #[bits(59)]
    __: u64,
}

/// Word 1 of CMD_ATC_INV.
#[bitfield(u64)]
pub(super) struct AtcWord {
    #[bits(6)]
    pub size: u8,
    #[bits(6)]
    __: u8,
    /// In 4 KiB.
    #[bits(52)]
    pub address: u64,
}

/// Word 1 of CMD_PRI_RESP.
#[bitfield(u64)]
pub(super) struct PriWord {
    #[bits(9)]
    pub group: u16,
    #[bits(3)]
    __: u8,
    #[bits(2)]
    pub response: u8,
    #[bits(50)]
    __: u64,
}

/// Word 1 of CMD_RESUME.
#[bitfield(u64)]
pub(super) struct StagWord {
    pub stag: u16,
    #[bits(48)]
    __: u64,
}

/// Word 0 of CMD_SYNC.
#[bitfield(u64)]
pub(super) struct SyncWord {
    pub opcode: u8,
    #[bits(4)]
    __: u8,
    /// CS: completion signal.
    #[bits(2)]
    pub signal: u8,
    #[bits(18)]
    __: u32,
    pub data: u32,
}

/// Word 1 of CMD_SYNC.
#[bitfield(u64)]
pub(super) struct SyncAddress {
    #[bits(2)]
    __: u8,
    /// In 4 bytes.
    #[bits(50)]
    pub address: u64,
    #[bits(12)]
    __: u16,
}
