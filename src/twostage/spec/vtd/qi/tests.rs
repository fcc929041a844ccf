// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
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
        let mask = words::reserved(kind).unwrap();
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
    // The words a driver writes: domain-selective IOTLB with drains, page-selective PASID IOTLB.
    let iotlb = Descriptor::decode([0x0005_00e2, 0, 0, 0]).unwrap();
    let expected =
        Descriptor::Iotlb { scope: IotlbScope::Domain(5), drain_writes: true, drain_reads: true };
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
