// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Descriptors of the invalidation queue (§6.5.2), types 1 to 9.
//!
//! [`Descriptor::decode`] checks the descriptor itself: type, reserved fields, reserved
//! granularities. Whether a unit supports the descriptor (its translation table mode, its
//! capabilities, the maximum mask) is up to the unit.

mod words;

use super::{PAGE_SHIFT, PAGE_SIZE};
use crate::spec::pci::{Bdf, Pasid};

/// 64-bit words of a descriptor. A 128-bit descriptor has the first two; the others are treated as
/// 0.
pub const WORDS: usize = 4;

/// The words of a descriptor, in host order.
pub type Words = [u64; WORDS];

/// What is wrong with a descriptor: the unit sets FSTS.IQE.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, thiserror::Error)]
pub enum DecodeError {
    /// No descriptor has this type.
    #[error("descriptor type {0:#x} is reserved")]
    Type(u8),
    /// A reserved bit is set, or a granularity is reserved.
    #[error("a reserved field of a type {0} descriptor is set")]
    Reserved(u8),
}

/// An address range of an IOTLB invalidation: `2^mask` pages of 4 KiB.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct AddressMask {
    /// ADDR: an address in the range, in bytes; the low `12 + mask` bits are ignored.
    pub address: u64,
    /// AM: binary logarithm of the number of pages, 0 to 63.
    pub mask: u8,
    /// IH: only leaf entries changed.
    pub leaf: bool,
}

/// The scope of a context-cache invalidation (G).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum ContextScope {
    /// All.
    Global,
    /// Those of a domain.
    Domain(u16),
    /// Those of a device.
    Device {
        /// DID: domain id of the old entry.
        domain: u16,
        /// SID: source id.
        source: Bdf,
        /// FM: how many low bits of the function number are ignored: 0 none, 1 bit 2, 2 bits 2:1, 3
        /// all.
        function_mask: u8,
    },
}

/// The scope of an IOTLB invalidation (G).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum IotlbScope {
    /// All.
    Global,
    /// Those of a domain.
    Domain(u16),
    /// Pages of a domain.
    Pages {
        /// DID: domain id.
        domain: u16,
        /// The pages.
        range: AddressMask,
    },
}

/// The scope of a PASID-cache invalidation (G).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum PasidCacheScope {
    /// All PASIDs of a domain.
    Domain(u16),
    /// One PASID of a domain.
    Pasid {
        /// DID: domain id.
        domain: u16,
        /// The PASID.
        pasid: Pasid,
    },
    /// All.
    Global,
}

/// The scope of an interrupt entry cache invalidation (G).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum InterruptEntryScope {
    /// All.
    Global,
    /// `2^mask` entries.
    Index {
        /// IIDX: an index in the range; the low `mask` bits are ignored.
        index: u16,
        /// IM: binary logarithm of the number of entries, 0 to 31.
        mask: u8,
    },
}

/// The addresses of a device-TLB invalidation, as encoded by PCIe ATS.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct DeviceTlbRange {
    /// ADDR: address in bytes; with [`DeviceTlbRange::size`], its lowest 0 bit determines the size.
    pub address: u64,
    /// S: more than one page.
    pub size: bool,
}

/// The status write of a wait descriptor.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct StatusWrite {
    /// GPA of a 32-bit word, in bytes, a multiple of 4.
    pub address: u64,
    /// The value to store.
    pub data: u32,
}

/// A descriptor of the invalidation queue.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Descriptor {
    /// Type 1: context-cache invalidate.
    ContextCache(ContextScope),
    /// Type 2: IOTLB invalidate.
    Iotlb {
        /// The scope.
        scope: IotlbScope,
        /// DW: drain writes.
        drain_writes: bool,
        /// DR: drain reads.
        drain_reads: bool,
    },
    /// Type 3: device-TLB invalidate.
    DeviceTlb {
        /// SID: the device.
        source: Bdf,
        /// PFSID: its physical function, if throttling is supported (ECAP.DIT).
        physical_function: u16,
        /// MIP: maximum invalidations pending.
        max_pending: u8,
        /// The addresses.
        range: DeviceTlbRange,
    },
    /// Type 4: interrupt entry cache invalidate.
    InterruptEntryCache(InterruptEntryScope),
    /// Type 5: invalidation wait.
    Wait {
        /// SW and the status: store it when everything before is complete.
        status: Option<StatusWrite>,
        /// IF: raise the invalidation completion event.
        interrupt: bool,
        /// FN: nothing after it starts before everything before it is complete.
        fence: bool,
        /// PD: drain page requests first (ECAP.PDS).
        drain_page_requests: bool,
    },
    /// Type 6: PASID-based IOTLB invalidate.
    PasidIotlb {
        /// DID: domain id.
        domain: u16,
        /// The PASID.
        pasid: Pasid,
        /// Pages; `None` for all addresses of the PASID.
        range: Option<AddressMask>,
    },
    /// Type 7: PASID-cache invalidate.
    PasidCache(PasidCacheScope),
    /// Type 8: PASID-based device-TLB invalidate.
    PasidDeviceTlb {
        /// SID: the device.
        source: Bdf,
        /// The PASID.
        pasid: Pasid,
        /// G: all PASIDs.
        global: bool,
        /// PFSID: its physical function, if throttling is supported (ECAP.DIT).
        physical_function: u16,
        /// MIP: maximum invalidations pending.
        max_pending: u8,
        /// The addresses.
        range: DeviceTlbRange,
    },
    /// Type 9: page group response.
    PageGroupResponse {
        /// RID: the requesting device.
        requester: Bdf,
        /// The PASID, if the request had one.
        pasid: Option<Pasid>,
        /// PRGI: page request group index, 9 bits.
        group: u16,
        /// RC: response code: 0 success, 1 invalid request, 15 failure.
        code: u8,
    },
}

impl Descriptor {
    /// The type of the descriptor `words`, whatever else they contain: 0 to 127.
    pub const fn raw_type(words: Words) -> u8 {
        let header = words::Header::from_bits(words[0]);
        header.low() | header.high() << 4
    }

    /// The type, 1 to 9.
    pub const fn descriptor_type(&self) -> u8 {
        match self {
            Self::ContextCache(_) => 1,
            Self::Iotlb { .. } => 2,
            Self::DeviceTlb { .. } => 3,
            Self::InterruptEntryCache(_) => 4,
            Self::Wait { .. } => 5,
            Self::PasidIotlb { .. } => 6,
            Self::PasidCache(_) => 7,
            Self::PasidDeviceTlb { .. } => 8,
            Self::PageGroupResponse { .. } => 9,
        }
    }

    /// The name of the type, as in the specification's section titles, for traces and counts.
    pub const fn name(&self) -> &'static str {
        match self {
            Self::ContextCache(_) => "context-cache",
            Self::Iotlb { .. } => "iotlb",
            Self::DeviceTlb { .. } => "device-tlb",
            Self::InterruptEntryCache(_) => "interrupt-entry-cache",
            Self::Wait { .. } => "wait",
            Self::PasidIotlb { .. } => "pasid-iotlb",
            Self::PasidCache(_) => "pasid-cache",
            Self::PasidDeviceTlb { .. } => "pasid-device-tlb",
            Self::PageGroupResponse { .. } => "page-group-response",
        }
    }

    /// Decodes `words`.
    ///
    /// # Errors
    /// The type is reserved, or a reserved field is set.
    pub fn decode(words: Words) -> Result<Self, DecodeError> {
        let kind = Self::raw_type(words);
        let reserved = DecodeError::Reserved(kind);
        let mask = words::reserved(kind).ok_or(DecodeError::Type(kind))?;
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
            // `words::reserved` only knows types 1 to 9.
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
                words::DeviceTlbLow::new()
                    .with_pfsid_low(physical_function as u8 & 0xf)
                    .with_mip(max_pending & 0x1f)
                    .with_sid(source.raw())
                    .with_pfsid_high(physical_function >> 4)
                    .into_bits(),
                encode_device_range(range),
            ],
            Self::InterruptEntryCache(scope) => [encode_interrupt_entry_cache(scope), 0],
            Self::Wait { status, interrupt, fence, drain_page_requests } => {
                let low = words::WaitLow::new()
                    .with_interrupt(interrupt)
                    .with_sw(status.is_some())
                    .with_fence(fence)
                    .with_pd(drain_page_requests)
                    .with_data(status.map_or(0, |status| status.data));
                [low.into_bits(), status.map_or(0, |status| status.address & !3)]
            }
            Self::PasidIotlb { domain, pasid, range } => {
                let low = words::PasidLow::new()
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
                words::PasidDeviceTlbLow::new()
                    .with_mip(max_pending & 0x1f)
                    .with_pfsid_low(physical_function as u8 & 0xf)
                    .with_sid(source.raw())
                    .with_pasid(pasid.raw())
                    .with_pfsid_high(physical_function >> 4)
                    .into_bits(),
                words::PasidDeviceTlbHigh::new()
                    .with_g(global)
                    .with_s(range.size)
                    .with_addr(range.address >> PAGE_SHIFT)
                    .into_bits(),
            ],
            Self::PageGroupResponse { requester, pasid, group, code } => [
                words::PageGroupLow::new()
                    .with_pp(pasid.is_some())
                    .with_rc(code & 0xf)
                    .with_rid(requester.raw())
                    .with_pasid(pasid.map_or(0, Pasid::raw))
                    .into_bits(),
                words::PageGroupHigh::new().with_prgi(group & 0x1ff).into_bits(),
            ],
        };
        let kind = words::Header::new().with_low(self.descriptor_type());
        [low | kind.into_bits(), high, 0, 0]
    }
}

fn decode_range(high: u64) -> AddressMask {
    let high = words::RangeHigh::from_bits(high);
    AddressMask { address: high.addr() << PAGE_SHIFT, mask: high.am(), leaf: high.ih() }
}

fn encode_range(range: AddressMask) -> u64 {
    words::RangeHigh::new()
        .with_am(range.mask & 0x3f)
        .with_ih(range.leaf)
        .with_addr(range.address >> PAGE_SHIFT)
        .into_bits()
}

fn encode_device_range(range: DeviceTlbRange) -> u64 {
    (range.address & !(PAGE_SIZE - 1)) | u64::from(range.size)
}

fn decode_context_cache(low: u64) -> Option<ContextScope> {
    let low = words::ContextCacheLow::from_bits(low);
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
    let low = words::ContextCacheLow::new();
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
    let low = words::IotlbLow::from_bits(low);
    let scope = match low.g() {
        1 => IotlbScope::Global,
        2 => IotlbScope::Domain(low.did()),
        3 => IotlbScope::Pages { domain: low.did(), range: decode_range(high) },
        _ => return None,
    };
    Some(Descriptor::Iotlb { scope, drain_writes: low.dw(), drain_reads: low.dr() })
}

fn encode_iotlb(scope: IotlbScope, drain_writes: bool, drain_reads: bool) -> [u64; 2] {
    let low = words::IotlbLow::new().with_dw(drain_writes).with_dr(drain_reads);
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
    let low = words::DeviceTlbLow::from_bits(low);
    Descriptor::DeviceTlb {
        source: Bdf::from_raw(low.sid()),
        physical_function: low.pfsid_high() << 4 | u16::from(low.pfsid_low()),
        max_pending: low.mip(),
        range: DeviceTlbRange { address: high & !(PAGE_SIZE - 1), size: high & 1 != 0 },
    }
}

fn decode_interrupt_entry_cache(low: u64) -> InterruptEntryScope {
    let low = words::InterruptEntryLow::from_bits(low);
    if low.g() {
        InterruptEntryScope::Index { index: low.iidx(), mask: low.im() }
    } else {
        InterruptEntryScope::Global
    }
}

fn encode_interrupt_entry_cache(scope: InterruptEntryScope) -> u64 {
    let low = words::InterruptEntryLow::new();
    match scope {
        InterruptEntryScope::Global => low,
        InterruptEntryScope::Index { index, mask } => {
            low.with_g(true).with_iidx(index).with_im(mask & 0x1f)
        }
    }
    .into_bits()
}

fn decode_wait(low: u64, high: u64) -> Descriptor {
    let low = words::WaitLow::from_bits(low);
    Descriptor::Wait {
        status: low.sw().then_some(StatusWrite { address: high, data: low.data() }),
        interrupt: low.interrupt(),
        fence: low.fence(),
        drain_page_requests: low.pd(),
    }
}

fn decode_pasid_iotlb(low: u64, high: u64) -> Option<Descriptor> {
    let low = words::PasidLow::from_bits(low);
    let range = match low.g() {
        2 => None,
        3 => Some(decode_range(high)),
        _ => return None,
    };
    Some(Descriptor::PasidIotlb { domain: low.did(), pasid: Pasid::new(low.pasid())?, range })
}

fn decode_pasid_cache(low: u64) -> Option<PasidCacheScope> {
    let low = words::PasidLow::from_bits(low);
    Some(match low.g() {
        0 => PasidCacheScope::Domain(low.did()),
        1 => PasidCacheScope::Pasid { domain: low.did(), pasid: Pasid::new(low.pasid())? },
        3 => PasidCacheScope::Global,
        _ => return None,
    })
}

fn encode_pasid_cache(scope: PasidCacheScope) -> u64 {
    let low = words::PasidLow::new();
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
    let low = words::PasidDeviceTlbLow::from_bits(low);
    let high = words::PasidDeviceTlbHigh::from_bits(high);
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
    let low = words::PageGroupLow::from_bits(low);
    let pasid = if low.pp() { Some(Pasid::new(low.pasid())?) } else { None };
    Some(Descriptor::PageGroupResponse {
        requester: Bdf::from_raw(low.rid()),
        pasid,
        group: words::PageGroupHigh::from_bits(high).prgi(),
        code: low.rc(),
    })
}

#[cfg(test)]
mod tests;
