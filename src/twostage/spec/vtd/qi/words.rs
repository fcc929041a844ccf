// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The 64-bit words of the descriptors (§6.5.2), and their reserved bits.

use bitfield_struct::bitfield;

use super::Words;

/// The type field of every descriptor.
#[bitfield(u64)]
pub(super) struct Header {
    #[bits(4)]
    pub low: u8,
    #[bits(5)]
    __: u8,
    #[bits(3)]
    pub high: u8,
    #[bits(52)]
    __: u64,
}

/// Type 1, low.
#[bitfield(u64)]
pub(super) struct ContextCacheLow {
    #[bits(4)]
    __: u8,
    #[bits(2)]
    pub g: u8,
    #[bits(10)]
    __: u16,
    pub did: u16,
    pub sid: u16,
    #[bits(2)]
    pub fm: u8,
    #[bits(14)]
    __: u16,
}

/// Type 2, low.
#[bitfield(u64)]
pub(super) struct IotlbLow {
    #[bits(4)]
    __: u8,
    #[bits(2)]
    pub g: u8,
    pub dw: bool,
    pub dr: bool,
    __: u8,
    pub did: u16,
    __: u32,
}

/// Types 2 and 6, high.
#[bitfield(u64)]
pub(super) struct RangeHigh {
    #[bits(6)]
    pub am: u8,
    pub ih: bool,
    #[bits(5)]
    __: u8,
    #[bits(52)]
    pub addr: u64,
}

/// Type 3, low.
#[bitfield(u64)]
pub(super) struct DeviceTlbLow {
    #[bits(12)]
    __: u16,
    #[bits(4)]
    pub pfsid_low: u8,
    #[bits(5)]
    pub mip: u8,
    #[bits(11)]
    __: u16,
    pub sid: u16,
    #[bits(4)]
    __: u8,
    #[bits(12)]
    pub pfsid_high: u16,
}

/// Type 4, low.
#[bitfield(u64)]
pub(super) struct InterruptEntryLow {
    #[bits(4)]
    __: u8,
    pub g: bool,
    #[bits(22)]
    __: u32,
    #[bits(5)]
    pub im: u8,
    pub iidx: u16,
    __: u16,
}

/// Type 5, low.
#[bitfield(u64)]
pub(super) struct WaitLow {
    #[bits(4)]
    __: u8,
    pub interrupt: bool,
    pub sw: bool,
    pub fence: bool,
    pub pd: bool,
    #[bits(24)]
    __: u32,
    pub data: u32,
}

/// Types 6 and 7, low.
#[bitfield(u64)]
pub(super) struct PasidLow {
    #[bits(4)]
    __: u8,
    #[bits(2)]
    pub g: u8,
    #[bits(10)]
    __: u16,
    pub did: u16,
    #[bits(20)]
    pub pasid: u32,
    #[bits(12)]
    __: u16,
}

/// Type 8, low.
#[bitfield(u64)]
pub(super) struct PasidDeviceTlbLow {
    #[bits(4)]
    __: u8,
    #[bits(5)]
    pub mip: u8,
    #[bits(3)]
    __: u8,
    #[bits(4)]
    pub pfsid_low: u8,
    pub sid: u16,
    #[bits(20)]
    pub pasid: u32,
    #[bits(12)]
    pub pfsid_high: u16,
}

/// Type 8, high.
#[bitfield(u64)]
pub(super) struct PasidDeviceTlbHigh {
    pub g: bool,
    #[bits(10)]
    __: u16,
    pub s: bool,
    #[bits(52)]
    pub addr: u64,
}

/// Type 9, low.
#[bitfield(u64)]
pub(super) struct PageGroupLow {
    #[bits(4)]
    __: u8,
    pub pp: bool,
    #[bits(7)]
    __: u8,
    #[bits(4)]
    pub rc: u8,
    pub rid: u16,
    #[bits(20)]
    pub pasid: u32,
    #[bits(12)]
    __: u16,
}

/// Type 9, high.
#[bitfield(u64)]
pub(super) struct PageGroupHigh {
    #[bits(3)]
    __: u8,
    #[bits(9)]
    pub prgi: u16,
    #[bits(52)]
    __: u64,
}

/// The bits of each word that must be zero in a descriptor of type `kind`; `None` for a reserved
/// type. The type's bits are not included.
pub(super) const fn reserved(kind: u8) -> Option<Words> {
    const ALL: u64 = u64::MAX;
    /// Bits that the low word of every descriptor uses: its type.
    const TYPE: u64 = 0xe0f;
    /// High word of a range: bits 11:7.
    const RANGE: u64 = 0xf80;
    Some(match kind {
        1 => [!(TYPE | 0x30 | 0x0003_ffff_ffff_0000), ALL, ALL, ALL],
        2 => [!(TYPE | 0xf0 | 0xffff_0000), RANGE, ALL, ALL],
        3 => [!(TYPE | 0x001f_f000 | 0xfff0_ffff_0000_0000), 0xffe, ALL, ALL],
        4 => [!(TYPE | 0x10 | 0xffff_f800_0000), ALL, ALL, ALL],
        5 => [!(TYPE | 0xf0 | 0xffff_ffff_0000_0000), 0x3, ALL, ALL],
        6 => [!(TYPE | 0x30 | 0x000f_ffff_ffff_0000), RANGE, ALL, ALL],
        7 => [!(TYPE | 0x30 | 0x000f_ffff_ffff_0000), ALL, ALL, ALL],
        8 => [!(TYPE | 0x1f0 | 0xffff_ffff_ffff_f000), 0x7fe, ALL, ALL],
        9 => [!(TYPE | 0x10 | 0x000f_ffff_ffff_f000), !0xff8, ALL, ALL],
        _ => return None,
    })
}
