// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Which capabilities of a device the guest sees, and how: two tables, and the walk of the lists in
//! configuration space.
//!
//! The lists and their contents come from the device: a pointer may lead anywhere. Each walk ends
//! at the first pointer that leads back, or where no capability can be.

use crate::pci::layout::{
    CAPABILITIES_POINTER, CAPABILITY_EXPRESS, CAPABILITY_MSI, CAPABILITY_MSIX, CAPABILITY_VENDOR,
    CONFIG_SIZE, EXTENDED_START, HEADER_END, STATUS, STATUS_CAPABILITIES,
};

/// Capability ID of power management (PCI PM 1.2 §3.2).
pub const CAPABILITY_POWER: u8 = 0x01;
/// Capability ID of vital product data.
pub const CAPABILITY_VPD: u8 = 0x03;

/// How the guest sees a capability.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Treatment {
    /// Not at all.
    Hidden,
    /// Read from the device each time, and written to it.
    Live,
    /// As it was when the machine was built.
    Constant,
    /// Power management, with emulated states.
    Power,
    /// PCI Express, as an integrated endpoint's.
    Express,
    /// MSI, emulated.
    Msi,
    /// MSI-X, emulated.
    Msix,
}

/// One line of a table.
#[derive(Debug)]
pub struct Rule {
    /// Capability ID, or extended capability ID.
    pub id: u16,
    /// Its name, for logs.
    pub name: &'static str,
    /// How the guest sees it.
    pub treatment: Treatment,
    /// Why.
    pub reason: &'static str,
}

const fn rule(id: u16, name: &'static str, treatment: Treatment, reason: &'static str) -> Rule {
    Rule { id, name, treatment, reason }
}

/// Capabilities. Others are hidden, as the effect of writing them is unknown.
pub const RULES: &[Rule] = &[
    rule(
        CAPABILITY_POWER as u16,
        "power management",
        Treatment::Power,
        "in D3 a device's memory vanishes from under the guest that has it mapped: it stays in D0",
    ),
    rule(CAPABILITY_VPD as u16, "VPD", Treatment::Live, "drivers read serial numbers from it"),
    rule(
        CAPABILITY_MSI as u16,
        "MSI",
        Treatment::Msi,
        "the host's driver owns the message; the guest's becomes a route of KVM's",
    ),
    rule(
        CAPABILITY_VENDOR as u16,
        "vendor",
        Treatment::Live,
        "only the device's driver knows what is in it",
    ),
    rule(
        CAPABILITY_EXPRESS as u16,
        "PCI Express",
        Treatment::Express,
        "there is no link: the device is on the root bus",
    ),
    rule(CAPABILITY_MSIX as u16, "MSI-X", Treatment::Msix, "as MSI"),
    rule(0x02, "AGP", Treatment::Hidden, "there is no such bus"),
    rule(0x04, "slot", Treatment::Hidden, "there is no slot"),
    rule(0x06, "hot swap", Treatment::Hidden, "there is no slot"),
    rule(0x07, "PCI-X", Treatment::Hidden, "there is no such bus"),
    rule(0x12, "SATA index and data", Treatment::Hidden, "it leads to registers behind I/O ports"),
    rule(0x13, "advanced features", Treatment::Hidden, "resets go through PCI Express"),
    rule(0x14, "enhanced allocation", Treatment::Hidden, "BARs are where the guest puts them"),
];

/// Extended capabilities, likewise.
pub const EXTENDED_RULES: &[Rule] = &[
    rule(0x03, "serial number", Treatment::Constant, "drivers tell devices apart by it"),
    rule(0x0b, "vendor", Treatment::Live, "only the device's driver knows what is in it"),
    rule(0x23, "designated vendor", Treatment::Live, "only the device's driver knows"),
    rule(0x01, "AER", Treatment::Hidden, "the host handles errors of the link"),
    rule(0x02, "virtual channel", Treatment::Hidden, "there is no link"),
    rule(0x0d, "ACS", Treatment::Hidden, "the host keeps devices apart"),
    rule(0x0e, "ARI", Treatment::Hidden, "the guest's bus has its own numbers"),
    rule(0x0f, "ATS", Treatment::Hidden, "the host's; the guest gets its own, see `services.rs`"),
    rule(0x10, "SR-IOV", Treatment::Hidden, "virtual functions are created by the host"),
    rule(0x13, "PRI", Treatment::Hidden, "as ATS"),
    rule(0x15, "resizable BAR", Treatment::Hidden, "a BAR is as long as the host made it"),
    rule(0x18, "LTR", Treatment::Hidden, "there is no link"),
    rule(0x19, "secondary PCI Express", Treatment::Hidden, "there is no link"),
    rule(0x1b, "PASID", Treatment::Hidden, "as ATS"),
    rule(0x1e, "L1 substates", Treatment::Hidden, "there is no link"),
];

/// How the guest sees the capability `id` of the list with `rules`.
pub fn treatment(rules: &[Rule], id: u16) -> Treatment {
    rules.iter().find(|rule| rule.id == id).map_or(Treatment::Hidden, |rule| rule.treatment)
}

/// Why the guest does not see the capability `id` of the list with `rules`, for logs.
pub fn why_hidden(rules: &[Rule], id: u16) -> String {
    match rules.iter().find(|rule| rule.id == id) {
        Some(rule) => format!("{}: {}", rule.name, rule.reason),
        None => format!("{id:#x}: it is unknown"),
    }
}

/// A capability in configuration space.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Capability {
    /// Its ID.
    pub id: u16,
    /// Where it starts.
    pub offset: u16,
    /// Bytes up to the next one, or to the end of its part of configuration space: its maximum
    /// length.
    pub room: u16,
}

fn byte(space: &[u8; CONFIG_SIZE], offset: u16) -> u8 {
    space.get(usize::from(offset)).copied().unwrap_or(0)
}

fn dword(space: &[u8; CONFIG_SIZE], offset: u16) -> u32 {
    let bytes = space.get(usize::from(offset)..).and_then(|rest| rest.first_chunk());
    bytes.map_or(0, |bytes| u32::from_le_bytes(*bytes))
}

/// The capabilities of `space`, in list order.
pub fn capabilities(space: &[u8; CONFIG_SIZE]) -> Vec<Capability> {
    let mut found = Vec::new();
    if u16::from(byte(space, STATUS)) & STATUS_CAPABILITIES == 0 {
        return found;
    }
    // The low two bits of a pointer are reserved (§7.5.1.1.11).
    let mut offset = u16::from(byte(space, CAPABILITIES_POINTER) & !3);
    while offset >= HEADER_END && !known(&found, offset) {
        found.push(Capability { id: byte(space, offset).into(), offset, room: 0 });
        offset = u16::from(byte(space, offset + 1) & !3);
    }
    with_room(found, EXTENDED_START)
}

/// The extended capabilities of `space`, in list order.
pub fn extended_capabilities(space: &[u8; CONFIG_SIZE]) -> Vec<Capability> {
    let mut found = Vec::new();
    let mut offset = EXTENDED_START;
    while offset >= EXTENDED_START && !known(&found, offset) {
        let header = dword(space, offset);
        // There are none, or nothing answers.
        if matches!(header, 0 | u32::MAX) {
            break;
        }
        found.push(Capability { id: header as u16, offset, room: 0 });
        // Bits 31:20, of which the low two are reserved (§7.6.3).
        offset = (header >> 20) as u16 & !3;
    }
    with_room(found, CONFIG_SIZE as u16)
}

fn known(found: &[Capability], offset: u16) -> bool {
    found.iter().any(|capability| capability.offset == offset)
}

/// Determines the maximum length of each of `found`, in the part of configuration space that ends
/// at `end`.
fn with_room(mut found: Vec<Capability>, end: u16) -> Vec<Capability> {
    let mut starts: Vec<_> = found.iter().map(|capability| capability.offset).collect();
    starts.sort_unstable();
    for capability in &mut found {
        let next = starts.iter().find(|start| **start > capability.offset);
        capability.room = next.copied().unwrap_or(end) - capability.offset;
    }
    found
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn space(bytes: &[(usize, &[u8])]) -> Box<[u8; CONFIG_SIZE]> {
        let mut space = Box::new([0; CONFIG_SIZE]);
        for (offset, bytes) in bytes {
            space[*offset..*offset + bytes.len()].copy_from_slice(bytes);
        }
        space
    }

    #[test]
    fn lists_are_followed() {
        let space = space(&[
            (6, &[0x10]),
            (0x34, &[0x82]),
            (0x80, &[5, 0x42]),
            (0x40, &[0x11, 0]),
            (0x100, &[3, 0, 1, 0x20]),
            (0x200, &[1, 0, 2, 0]),
        ]);
        let found = |id, offset, room| Capability { id, offset, room };
        assert_eq!(capabilities(&space), [found(5, 0x80, 0x80), found(0x11, 0x40, 0x40)]);
        let extended = extended_capabilities(&space);
        assert_eq!(extended, [found(3, 0x100, 0x100), found(1, 0x200, 0xe00)]);
    }

    #[test]
    fn without_a_list_there_is_none() {
        assert!(capabilities(&space(&[(0x34, &[0x40]), (0x40, &[5])])).is_empty());
        assert!(extended_capabilities(&space(&[])).is_empty());
        assert!(extended_capabilities(&space(&[(0x100, &[0xff; 4])])).is_empty());
    }

    #[test]
    fn what_hands_out_power_over_the_host_is_hidden() {
        for id in [0x0f, 0x10, 0x13, 0x1b, 0xffff] {
            assert_eq!(treatment(EXTENDED_RULES, id), Treatment::Hidden);
        }
        assert_eq!(
            why_hidden(EXTENDED_RULES, 0x10),
            "SR-IOV: virtual functions are created by the host"
        );
        assert_eq!(why_hidden(RULES, 0xff), "0xff: it is unknown");
        assert_eq!(treatment(RULES, 0x11), Treatment::Msix);
        assert_eq!(treatment(RULES, 0xff), Treatment::Hidden);
    }

    #[test]
    fn no_capability_has_two_rules() {
        for rules in [RULES, EXTENDED_RULES] {
            for (number, rule) in rules.iter().enumerate() {
                assert!(rules[..number].iter().all(|other| other.id != rule.id), "{}", rule.name);
            }
        }
    }

    proptest! {
        #[test]
        fn no_list_loops_or_leads_out(
            head in prop::collection::vec(any::<u8>(), 256),
            tail in prop::collection::vec(any::<u8>(), 3840),
        ) {
            let mut space = space(&[(0, &head), (256, &tail)]);
            space[6] |= 0x10;
            for capability in capabilities(&space) {
                prop_assert!(capability.offset >= 0x40 && capability.room > 0);
                prop_assert!(capability.offset + capability.room <= 0x100);
            }
            for capability in extended_capabilities(&space) {
                prop_assert!(capability.offset >= 0x100 && capability.room > 0);
                prop_assert!(capability.offset + capability.room <= 0x1000);
            }
        }
    }
}
