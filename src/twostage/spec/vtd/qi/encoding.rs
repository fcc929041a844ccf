// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The words of descriptors: conversion, the layouts of their 64-bit words (§6.5.2), and their
//! reserved bits.

use twostage_bits::bitfield;

use super::{
    AddressMask, ContextScope, DecodeError, Descriptor, DeviceTlbRange, InterruptEntryScope,
    IotlbScope, PasidCacheScope, StatusWrite, Words,
};
use crate::spec::pci::{Bdf, Pasid};
use crate::spec::vtd::{PAGE_SHIFT, PAGE_SIZE};

impl Descriptor {
    /// Decodes `words`.
    ///
    /// # Errors
    /// The type is reserved, or a reserved field is set.
    pub fn decode(words: Words) -> Result<Self, DecodeError> {
        let kind = Self::raw_type(words);
        let mask = reserved(kind).ok_or(DecodeError::Type(kind))?;
        let reserved = DecodeError::Reserved(kind);
        if words.iter().zip(mask).any(|(word, mask)| word & mask != 0) {
            return Err(reserved);
        }
        let [low, high, ..] = words;
        match kind {
            1 => decode_context_cache(low).map(Self::ContextCache),
            2 => decode_iotlb(low, high),
            3 => Some(decode_device_tlb(low, high)),
            4 => Some(Self::InterruptEntryCache(decode_interrupt_entry_cache(low))),
            5 => Some(decode_wait(low, high)),
            6 => decode_pasid_iotlb(low, high),
            7 => decode_pasid_cache(low).map(Self::PasidCache),
            8 => decode_pasid_device_tlb(low, high),
            // `reserved` only knows types 1 to 9.
            _ => decode_page_group_response(low, high),
        }
        .ok_or(reserved)
    }

    /// The words of the descriptor, which [`Descriptor::decode`] decodes to the same.
    pub fn encode(&self) -> Words {
        let [low, high] = match *self {
            Self::ContextCache(scope) => [encode_context_cache(scope), 0],
            Self::Iotlb { scope, drain_writes, drain_reads } => {
                encode_iotlb(scope, drain_writes, drain_reads)
            }
            Self::DeviceTlb { source, physical_function, max_pending, range } => [
                DeviceTlbLow::new()
                    .with_pfsid_low(physical_function as u8 & 0xf)
                    .with_mip(max_pending & 0x1f)
                    .with_sid(source.raw())
                    .with_pfsid_high(physical_function >> 4)
                    .into_bits(),
                encode_device_range(range),
            ],
            Self::InterruptEntryCache(scope) => [encode_interrupt_entry_cache(scope), 0],
            Self::Wait { status, interrupt, fence, drain_page_requests } => {
                let low = WaitLow::new()
                    .with_interrupt(interrupt)
                    .with_sw(status.is_some())
                    .with_fence(fence)
                    .with_pd(drain_page_requests)
                    .with_data(status.map_or(0, |status| status.data));
                [low.into_bits(), status.map_or(0, |status| status.address & !3)]
            }
            Self::PasidIotlb { domain, pasid, range } => {
                let low = PasidLow::new()
                    .with_g(if range.is_some() { 3 } else { 2 })
                    .with_did(domain)
                    .with_pasid(pasid.raw());
                [low.into_bits(), range.map_or(0, encode_range)]
            }
            Self::PasidCache(scope) => [encode_pasid_cache(scope), 0],
            Self::PasidDeviceTlb {
                source,
                pasid,
                global,
                physical_function,
                max_pending,
                range,
            } => [
                PasidDeviceTlbLow::new()
                    .with_mip(max_pending & 0x1f)
                    .with_pfsid_low(physical_function as u8 & 0xf)
                    .with_sid(source.raw())
                    .with_pasid(pasid.raw())
                    .with_pfsid_high(physical_function >> 4)
                    .into_bits(),
                PasidDeviceTlbHigh::new()
                    .with_g(global)
                    .with_s(range.size)
                    .with_addr(range.address >> PAGE_SHIFT)
                    .into_bits(),
            ],
            Self::PageGroupResponse { requester, pasid, group, code } => [
                PageGroupLow::new()
                    .with_pp(pasid.is_some())
                    .with_rc(code & 0xf)
                    .with_rid(requester.raw())
                    .with_pasid(pasid.map_or(0, Pasid::raw))
                    .into_bits(),
                PageGroupHigh::new().with_prgi(group & 0x1ff).into_bits(),
            ],
        };
        let kind = Header::new().with_low(self.descriptor_type());
        [low | kind.into_bits(), high, 0, 0]
    }
}

fn decode_range(high: u64) -> AddressMask {
    let high = RangeHigh::from_bits(high);
    AddressMask { address: high.addr() << PAGE_SHIFT, mask: high.am(), leaf: high.ih() }
}

fn encode_range(range: AddressMask) -> u64 {
    RangeHigh::new()
        .with_am(range.mask & 0x3f)
        .with_ih(range.leaf)
        .with_addr(range.address >> PAGE_SHIFT)
        .into_bits()
}

fn encode_device_range(range: DeviceTlbRange) -> u64 {
    (range.address & !(PAGE_SIZE - 1)) | u64::from(range.size)
}

fn decode_context_cache(low: u64) -> Option<ContextScope> {
    let low = ContextCacheLow::from_bits(low);
    Some(match low.g() {
        1 => ContextScope::Global,
        2 => ContextScope::Domain(low.did()),
        3 => ContextScope::Device {
            domain: low.did(),
            source: Bdf::from_raw(low.sid()),
            function_mask: low.fm(),
        },
        _ => return None,
    })
}

fn encode_context_cache(scope: ContextScope) -> u64 {
    let low = ContextCacheLow::new();
    match scope {
        ContextScope::Global => low.with_g(1),
        ContextScope::Domain(domain) => low.with_g(2).with_did(domain),
        ContextScope::Device { domain, source, function_mask } => {
            low.with_g(3).with_did(domain).with_sid(source.raw()).with_fm(function_mask & 3)
        }
    }
    .into_bits()
}

fn decode_iotlb(low: u64, high: u64) -> Option<Descriptor> {
    let low = IotlbLow::from_bits(low);
    let scope = match low.g() {
        1 => IotlbScope::Global,
        2 => IotlbScope::Domain(low.did()),
        3 => IotlbScope::Pages { domain: low.did(), range: decode_range(high) },
        _ => return None,
    };
    Some(Descriptor::Iotlb { scope, drain_writes: low.dw(), drain_reads: low.dr() })
}

fn encode_iotlb(scope: IotlbScope, drain_writes: bool, drain_reads: bool) -> [u64; 2] {
    let low = IotlbLow::new().with_dw(drain_writes).with_dr(drain_reads);
    let (low, high) = match scope {
        IotlbScope::Global => (low.with_g(1), 0),
        IotlbScope::Domain(domain) => (low.with_g(2).with_did(domain), 0),
        IotlbScope::Pages { domain, range } => {
            (low.with_g(3).with_did(domain), encode_range(range))
        }
    };
    [low.into_bits(), high]
}

fn decode_device_tlb(low: u64, high: u64) -> Descriptor {
    let low = DeviceTlbLow::from_bits(low);
    Descriptor::DeviceTlb {
        source: Bdf::from_raw(low.sid()),
        physical_function: low.pfsid_high() << 4 | u16::from(low.pfsid_low()),
        max_pending: low.mip(),
        range: DeviceTlbRange { address: high & !(PAGE_SIZE - 1), size: high & 1 != 0 },
    }
}

fn decode_interrupt_entry_cache(low: u64) -> InterruptEntryScope {
    let low = InterruptEntryLow::from_bits(low);
    if low.g() {
        InterruptEntryScope::Index { index: low.iidx(), mask: low.im() }
    } else {
        InterruptEntryScope::Global
    }
}

fn encode_interrupt_entry_cache(scope: InterruptEntryScope) -> u64 {
    let low = InterruptEntryLow::new();
    match scope {
        InterruptEntryScope::Global => low,
        InterruptEntryScope::Index { index, mask } => {
            low.with_g(true).with_iidx(index).with_im(mask & 0x1f)
        }
    }
    .into_bits()
}

fn decode_wait(low: u64, high: u64) -> Descriptor {
    let low = WaitLow::from_bits(low);
    Descriptor::Wait {
        status: low.sw().then_some(StatusWrite { address: high, data: low.data() }),
        interrupt: low.interrupt(),
        fence: low.fence(),
        drain_page_requests: low.pd(),
    }
}

fn decode_pasid_iotlb(low: u64, high: u64) -> Option<Descriptor> {
    let low = PasidLow::from_bits(low);
    let range = match low.g() {
        2 => None,
        3 => Some(decode_range(high)),
        _ => return None,
    };
    Some(Descriptor::PasidIotlb { domain: low.did(), pasid: Pasid::new(low.pasid())?, range })
}

fn decode_pasid_cache(low: u64) -> Option<PasidCacheScope> {
    let low = PasidLow::from_bits(low);
    Some(match low.g() {
        0 => PasidCacheScope::Domain(low.did()),
        1 => PasidCacheScope::Pasid { domain: low.did(), pasid: Pasid::new(low.pasid())? },
        3 => PasidCacheScope::Global,
        _ => return None,
    })
}

fn encode_pasid_cache(scope: PasidCacheScope) -> u64 {
    let low = PasidLow::new();
    match scope {
        PasidCacheScope::Domain(domain) => low.with_did(domain),
        PasidCacheScope::Pasid { domain, pasid } => {
            low.with_g(1).with_did(domain).with_pasid(pasid.raw())
        }
        PasidCacheScope::Global => low.with_g(3),
    }
    .into_bits()
}

fn decode_pasid_device_tlb(low: u64, high: u64) -> Option<Descriptor> {
    let low = PasidDeviceTlbLow::from_bits(low);
    let high = PasidDeviceTlbHigh::from_bits(high);
    Some(Descriptor::PasidDeviceTlb {
        source: Bdf::from_raw(low.sid()),
        pasid: Pasid::new(low.pasid())?,
        global: high.g(),
        physical_function: low.pfsid_high() << 4 | u16::from(low.pfsid_low()),
        max_pending: low.mip(),
        range: DeviceTlbRange { address: high.addr() << PAGE_SHIFT, size: high.s() },
    })
}

fn decode_page_group_response(low: u64, high: u64) -> Option<Descriptor> {
    let low = PageGroupLow::from_bits(low);
    let pasid = if low.pp() { Some(Pasid::new(low.pasid())?) } else { None };
    Some(Descriptor::PageGroupResponse {
        requester: Bdf::from_raw(low.rid()),
        pasid,
        group: PageGroupHigh::from_bits(high).prgi(),
        code: low.rc(),
    })
}

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
struct ContextCacheLow {
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
struct IotlbLow {
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
struct RangeHigh {
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
struct DeviceTlbLow {
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
struct InterruptEntryLow {
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
struct WaitLow {
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
struct PasidLow {
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
struct PasidDeviceTlbLow {
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
struct PasidDeviceTlbHigh {
    pub g: bool,
    #[bits(10)]
    __: u16,
    pub s: bool,
    #[bits(52)]
    pub addr: u64,
}

/// Type 9, low.
#[bitfield(u64)]
struct PageGroupLow {
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
struct PageGroupHigh {
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
        // Bit 66 was LPIG before revision 4, which drivers still set; hardware ignores it.
        9 => [!(TYPE | 0x10 | 0x000f_ffff_ffff_f000), !0xffc, ALL, ALL],
        _ => return None,
    })
}
