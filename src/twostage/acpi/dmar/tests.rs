// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! DMAR as §8 lays it out, byte by byte.

use super::*;
use proptest::prelude::*;

fn bytes(aml: &dyn Aml) -> Vec<u8> {
    let mut bytes = Vec::new();
    aml.to_aml_bytes(&mut bytes);
    bytes
}

fn table() -> DMAR {
    DMAR::new(*b"FOOBAR", *b"CAFEDEAD", 0xdead_beef, 52)
}

fn sum(bytes: &[u8]) -> u8 {
    bytes.iter().fold(0, |sum, byte| sum.wrapping_add(*byte))
}

#[test]
fn the_header_is_laid_out_as_section_8_1_has_it() {
    let dmar = bytes(&table().flag(Flags::IntrRemap).flag(Flags::X2apicOptOut));
    assert_eq!(dmar.len(), 48);
    assert_eq!(&dmar[..4], b"DMAR");
    assert_eq!(dmar[4..9], [48, 0, 0, 0, 1]);
    assert_eq!(&dmar[10..24], b"FOOBARCAFEDEAD");
    assert_eq!(dmar[24..28], [0xef, 0xbe, 0xad, 0xde]);
    // The width less one, the flags, ten reserved bytes.
    assert_eq!(dmar[36..], [51, 0b11, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
    assert_eq!(sum(&dmar), 0);
    assert_eq!(bytes(&table().flag(Flags::DmaCtrlPlatformOptIn))[37], 1 << 2);
}

#[test]
fn a_unit_with_an_ioapic_is_laid_out_as_section_8_3_has_it() {
    let mut drhd = Drhd::new(0x1234, 0xfed9_0000).include_pci_all();
    drhd.add_scope(DeviceScope::ioapic(7, PciPath::new(0xff, 0x1e, 6)));
    #[rustfmt::skip]
    let expected = [
        0, 0, 24, 0, 1, 0, 0x34, 0x12, 0x00, 0x00, 0xd9, 0xfe, 0, 0, 0, 0,
        3, 8, 0, 0, 7, 0xff, 0x1e, 6,
    ];
    assert_eq!(bytes(&drhd), expected);
    let mut dmar = table();
    dmar.add_structure(drhd);
    let dmar = bytes(&dmar);
    assert_eq!(dmar[48..], expected);
    assert_eq!(dmar[4..8], [72, 0, 0, 0]);
    assert_eq!(sum(&dmar), 0);
}

#[test]
fn scopes_are_laid_out_as_section_8_3_1_has_them() {
    let endpoint = DeviceScope::pci_endpoint(PciPath::new(0, 3, 1));
    assert_eq!(bytes(&endpoint), [1, 8, 0, 0, 0, 0, 3, 1]);
    let behind_bridges = PciPath::new(2, 0x1c, 4).then(0, 0).then(5, 2);
    let endpoint = DeviceScope::pci_endpoint(behind_bridges);
    assert_eq!(bytes(&endpoint), [1, 12, 0, 0, 0, 2, 0x1c, 4, 0, 0, 5, 2]);
    let bridge = DeviceScope::pci_sub_hierarchy(PciPath::new(0, 1, 0));
    assert_eq!(bytes(&bridge), [2, 8, 0, 0, 0, 0, 1, 0]);
    let hpet = DeviceScope::msi_capable_hpet(1, PciPath::new(0xff, 0x1f, 0));
    assert_eq!(bytes(&hpet), [4, 8, 0, 0, 1, 0xff, 0x1f, 0]);
}

#[test]
fn a_function_behind_bridges_is_found_by_its_path_or_that_of_the_bridge_to_pci() {
    let bdf = |text: &str| text.parse::<Bdf>().unwrap();
    let bridge = |at, secondary, kind| Bridge { bdf: bdf(at), secondary, kind };
    let port = bridge("00:1c.4", 1, BridgeKind::Port);
    let to_pci = bridge("01:00.0", 2, BridgeKind::ExpressToPci);
    let scope =
        |function, bridges: &[Bridge]| bytes(&DeviceScope::of_function(bdf(function), bridges));
    assert_eq!(scope("00:03.1", &[]), [1, 8, 0, 0, 0, 0, 3, 1]);
    assert_eq!(scope("01:00.2", &[port]), [1, 10, 0, 0, 0, 0, 0x1c, 4, 0, 2]);
    let shared = [2, 10, 0, 0, 0, 0, 0x1c, 4, 0, 0];
    assert_eq!(scope("02:00.0", &[port, to_pci]), shared);
    assert_eq!(scope("02:05.0", &[port, to_pci]), shared);
    let behind = bridge("02:04.0", 3, BridgeKind::PciToPci);
    assert_eq!(scope("03:05.0", &[port, to_pci, behind]), shared);
}

#[test]
fn the_other_structures_are_laid_out_as_sections_8_4_to_8_6_have_them() {
    let mut rmrr = Rmrr::new(1, 0x7f80_0000, 0x7fff_ffff);
    rmrr.add_scope(DeviceScope::pci_endpoint(PciPath::new(0, 2, 0)));
    #[rustfmt::skip]
    assert_eq!(bytes(&rmrr), [
        1, 0, 32, 0, 0, 0, 1, 0,
        0, 0, 0x80, 0x7f, 0, 0, 0, 0, 0xff, 0xff, 0xff, 0x7f, 0, 0, 0, 0,
        1, 8, 0, 0, 0, 0, 2, 0,
    ]);
    assert_eq!(bytes(&Atsr::new(2).all_ports()), [2, 0, 8, 0, 1, 0, 2, 0]);
    let mut atsr = Atsr::new(0);
    atsr.add_scope(DeviceScope::pci_sub_hierarchy(PciPath::new(0, 6, 0)));
    assert_eq!(bytes(&atsr), [2, 0, 16, 0, 0, 0, 0, 0, 2, 8, 0, 0, 0, 0, 6, 0]);
    let rhsa = Rhsa::new(0xfed9_1000, 0x0102_0304);
    #[rustfmt::skip]
    assert_eq!(bytes(&rhsa), [
        3, 0, 20, 0, 0, 0, 0, 0, 0x00, 0x10, 0xd9, 0xfe, 0, 0, 0, 0, 4, 3, 2, 1,
    ]);
}

proptest! {
    /// Lengths lead from structure to structure and from scope to scope, exactly to the end,
    /// and the checksum is right.
    #[test]
    fn lengths_and_checksum_hold_for_any_table(
        units in prop::collection::vec(prop::collection::vec(1usize..5, 0..6), 0..6),
        width in 1u8..=64,
    ) {
        let mut dmar = DMAR::new(*b"TESTER", *b"PROPERTY", 1, width);
        for unit in &units {
            let mut drhd = Drhd::new(0, 0x1000);
            for hops in unit {
                let path = (1..*hops).fold(PciPath::new(0, 1, 0), |path, _| path.then(2, 3));
                drhd.add_scope(DeviceScope::pci_endpoint(path));
            }
            dmar.add_structure(drhd);
        }
        let dmar = bytes(&dmar);
        prop_assert_eq!(sum(&dmar), 0);
        prop_assert_eq!(dmar.len() as u32, u32::from_le_bytes(dmar[4..8].try_into().unwrap()));
        let mut at = 48;
        let mut found = Vec::new();
        while at < dmar.len() {
            let end = at + usize::from(u16::from_le_bytes([dmar[at + 2], dmar[at + 3]]));
            let mut scope = at + 16;
            let mut hops = Vec::new();
            while scope < end {
                let length = usize::from(dmar[scope + 1]);
                hops.push((length - 6) / 2);
                scope += length;
            }
            prop_assert_eq!(scope, end);
            found.push(hops);
            at = end;
        }
        prop_assert_eq!(found, units);
    }
}
