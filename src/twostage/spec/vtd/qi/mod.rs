// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Descriptors of the invalidation queue (§6.5.2), types 1 to 9.
//!
//! [`Descriptor::decode`] checks the descriptor itself: type, reserved fields, reserved
//! granularities. Whether a unit supports the descriptor (its translation table mode, its
//! capabilities, the maximum mask) is up to the unit.

mod fields;
mod words;

use super::PAGE_SHIFT;
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
            1 => fields::decode_context_cache(low).map(Self::ContextCache),
            2 => fields::decode_iotlb(low, high),
            3 => Some(fields::decode_device_tlb(low, high)),
            4 => Some(Self::InterruptEntryCache(fields::decode_interrupt_entry_cache(low))),
            5 => Some(fields::decode_wait(low, high)),
            6 => fields::decode_pasid_iotlb(low, high),
            7 => fields::decode_pasid_cache(low).map(Self::PasidCache),
            8 => fields::decode_pasid_device_tlb(low, high),
            // `words::reserved` only knows types 1 to 9.
            _ => fields::decode_page_group_response(low, high),
        }
        .ok_or(reserved)
    }

    /// The words of the descriptor, which [`Descriptor::decode`] decodes to the same.
    pub fn encode(&self) -> Words {
        let [low, high] = match *self {
            Self::ContextCache(scope) => [fields::encode_context_cache(scope), 0],
            Self::Iotlb { scope, drain_writes, drain_reads } => {
                fields::encode_iotlb(scope, drain_writes, drain_reads)
            }
            Self::DeviceTlb { source, physical_function, max_pending, range } => [
                words::DeviceTlbLow::new()
                    .with_pfsid_low(physical_function as u8 & 0xf)
                    .with_mip(max_pending & 0x1f)
                    .with_sid(source.raw())
                    .with_pfsid_high(physical_function >> 4)
                    .into_bits(),
                fields::encode_device_range(range),
            ],
            Self::InterruptEntryCache(scope) => [fields::encode_interrupt_entry_cache(scope), 0],
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
                [low.into_bits(), range.map_or(0, fields::encode_range)]
            }
            Self::PasidCache(scope) => [fields::encode_pasid_cache(scope), 0],
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

#[cfg(test)]
mod tests;
