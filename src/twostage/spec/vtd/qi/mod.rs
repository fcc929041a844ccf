// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Descriptors of the invalidation queue (§6.5.2), types 1 to 9.
//!
//! [`Descriptor::decode`] checks the descriptor itself: type, reserved fields, reserved
//! granularities. Whether a unit supports the descriptor (its translation table mode, its
//! capabilities, the maximum mask) is up to the unit.

mod encoding;

use crate::spec::pci::{Bdf, Pasid};

/// 64-bit words of a descriptor. A 128-bit descriptor has the first two; the others are treated as
/// 0.
pub const WORDS: usize = 4;

/// The words of a descriptor, in host order.
pub type Words = [u64; WORDS];

/// What is wrong with a descriptor: the unit sets FSTS.IQE.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, thiserror::Error)]
#[non_exhaustive]
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
        let header = encoding::Header::from_bits(words[0]);
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
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::spec::vtd::PAGE_SIZE;

    fn page() -> impl Strategy<Value = u64> {
        any::<u64>().prop_map(|address| address & !(PAGE_SIZE - 1))
    }

    fn bdf() -> impl Strategy<Value = Bdf> {
        any::<u16>().prop_map(Bdf::from_raw)
    }

    fn pasid() -> impl Strategy<Value = Pasid> {
        (0..1u32 << Pasid::BITS).prop_map(|pasid| Pasid::new(pasid).unwrap())
    }

    fn address_mask() -> impl Strategy<Value = AddressMask> {
        (page(), 0..64u8, any::<bool>()).prop_map(|(address, mask, leaf)| AddressMask {
            address,
            mask,
            leaf,
        })
    }

    fn device_range() -> impl Strategy<Value = DeviceTlbRange> {
        (page(), any::<bool>()).prop_map(|(address, size)| DeviceTlbRange { address, size })
    }

    fn context_scope() -> impl Strategy<Value = ContextScope> {
        prop_oneof![
            Just(ContextScope::Global),
            any::<u16>().prop_map(ContextScope::Domain),
            (any::<u16>(), bdf(), 0..4u8).prop_map(|(domain, source, function_mask)| {
                ContextScope::Device { domain, source, function_mask }
            }),
        ]
    }

    fn iotlb_scope() -> impl Strategy<Value = IotlbScope> {
        prop_oneof![
            Just(IotlbScope::Global),
            any::<u16>().prop_map(IotlbScope::Domain),
            (any::<u16>(), address_mask())
                .prop_map(|(domain, range)| IotlbScope::Pages { domain, range }),
        ]
    }

    fn status() -> impl Strategy<Value = StatusWrite> {
        (any::<u64>(), any::<u32>())
            .prop_map(|(address, data)| StatusWrite { address: address & !3, data })
    }

    fn descriptor() -> impl Strategy<Value = Descriptor> {
        prop_oneof![
            context_scope().prop_map(Descriptor::ContextCache),
            (iotlb_scope(), any::<bool>(), any::<bool>()).prop_map(
                |(scope, drain_writes, drain_reads)| Descriptor::Iotlb {
                    scope,
                    drain_writes,
                    drain_reads
                }
            ),
            (bdf(), any::<u16>(), 0..32u8, device_range()).prop_map(
                |(source, physical_function, max_pending, range)| Descriptor::DeviceTlb {
                    source,
                    physical_function,
                    max_pending,
                    range
                }
            ),
            Just(Descriptor::InterruptEntryCache(InterruptEntryScope::Global)),
            (any::<u16>(), 0..32u8).prop_map(|(index, mask)| {
                Descriptor::InterruptEntryCache(InterruptEntryScope::Index { index, mask })
            }),
            (proptest::option::of(status()), any::<bool>(), any::<bool>(), any::<bool>()).prop_map(
                |(status, interrupt, fence, drain_page_requests)| Descriptor::Wait {
                    status,
                    interrupt,
                    fence,
                    drain_page_requests
                }
            ),
            (any::<u16>(), pasid(), proptest::option::of(address_mask()))
                .prop_map(|(domain, pasid, range)| Descriptor::PasidIotlb { domain, pasid, range }),
            Just(Descriptor::PasidCache(PasidCacheScope::Global)),
            any::<u16>().prop_map(|domain| Descriptor::PasidCache(PasidCacheScope::Domain(domain))),
            (any::<u16>(), pasid()).prop_map(|(domain, pasid)| {
                Descriptor::PasidCache(PasidCacheScope::Pasid { domain, pasid })
            }),
            (bdf(), pasid(), any::<bool>(), any::<u16>(), 0..32u8, device_range()).prop_map(
                |(source, pasid, global, physical_function, max_pending, range)| {
                    Descriptor::PasidDeviceTlb {
                        source,
                        pasid,
                        global,
                        physical_function,
                        max_pending,
                        range,
                    }
                }
            ),
            (bdf(), proptest::option::of(pasid()), 0..512u16, 0..16u8).prop_map(
                |(requester, pasid, group, code)| Descriptor::PageGroupResponse {
                    requester,
                    pasid,
                    group,
                    code
                }
            ),
        ]
    }

    proptest! {
        #[test]
        fn what_is_encoded_is_decoded(descriptor in descriptor()) {
            prop_assert_eq!(Descriptor::decode(descriptor.encode()), Ok(descriptor));
        }

        #[test]
        fn every_reserved_bit_is_refused(descriptor in descriptor(), bit in 0..256usize) {
            let kind = descriptor.descriptor_type();
            let mut words = descriptor.encode();
            words[bit / 64] |= 1 << (bit % 64);
            let mask = encoding::reserved(kind).unwrap();
            if mask[bit / 64] >> (bit % 64) & 1 != 0 {
                prop_assert_eq!(Descriptor::decode(words), Err(DecodeError::Reserved(kind)));
            }
        }

        #[test]
        fn any_words_decode_or_are_refused(words in any::<[u64; 4]>(), kind in 0..16u64) {
            for words in [words, [words[0] & !0xe0f | kind, words[1], 0, 0]] {
                let kind = Descriptor::raw_type(words);
                match Descriptor::decode(words) {
                    // Fields that the scope does not use are dropped, so only the type is compared.
                    Ok(descriptor) => {
                        prop_assert_eq!(descriptor.descriptor_type(), kind);
                        prop_assert_eq!(Descriptor::decode(descriptor.encode()), Ok(descriptor));
                    }
                    Err(DecodeError::Type(of)) => prop_assert!(of == kind && !(1..=9).contains(&kind)),
                    Err(DecodeError::Reserved(of)) => prop_assert_eq!(of, kind),
                }
            }
        }
    }

    #[test]
    fn known_words() {
        // As a driver writes them: domain-selective IOTLB with drains, page-selective PASID IOTLB.
        let iotlb = Descriptor::decode([0x0005_00e2, 0, 0, 0]).unwrap();
        let expected = Descriptor::Iotlb {
            scope: IotlbScope::Domain(5),
            drain_writes: true,
            drain_reads: true,
        };
        assert_eq!(iotlb, expected);
        let pasid_iotlb = Descriptor::decode([0x0000_0007_0005_0036, 0x1234_5043, 0, 0]).unwrap();
        let expected = Descriptor::PasidIotlb {
            domain: 5,
            pasid: Pasid::new(7).unwrap(),
            range: Some(AddressMask { address: 0x1234_5000, mask: 3, leaf: true }),
        };
        assert_eq!(pasid_iotlb, expected);
        let wait = Descriptor::decode([0x0000_0002_0000_0025, 0x8000, 0, 0]).unwrap();
        let expected = Descriptor::Wait {
            status: Some(StatusWrite { address: 0x8000, data: 2 }),
            interrupt: false,
            fence: false,
            drain_page_requests: false,
        };
        assert_eq!(wait, expected);
    }

    #[test]
    fn reserved_granularities_are_refused() {
        for low in [0x01, 0x02, 0x06, 0x16, 0x27u64] {
            let kind = low as u8 & 0xf;
            assert_eq!(Descriptor::decode([low, 0, 0, 0]), Err(DecodeError::Reserved(kind)));
        }
    }

    #[test]
    fn the_type_has_seven_bits() {
        assert_eq!(Descriptor::raw_type([0x201, 0, 0, 0]), 0x11);
        assert_eq!(Descriptor::decode([0x211, 0, 0, 0]), Err(DecodeError::Type(0x11)));
        assert_eq!(Descriptor::decode([0; 4]), Err(DecodeError::Type(0)));
    }
}
