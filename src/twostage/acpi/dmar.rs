// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! DMAR: describes Intel's DMA and interrupt remapping hardware, and what is behind it.
//!
//! Source: Intel Virtualization Technology for Directed I/O, §8 (BIOS considerations).
//!
//! In the style of `acpi_tables`, which has no DMAR.

use acpi_tables::sdt::Sdt;
use acpi_tables::{Aml, AmlSink};

/// Remapping structure types (§8.2).
#[repr(u16)]
enum StructureType {
    Drhd = 0,
    Rmrr = 1,
    Atsr = 2,
    Rhsa = 3,
}

/// Flags of the table (§8.1).
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Flags {
    /// The platform remaps interrupts.
    IntrRemap = 1 << 0,
    /// The platform asks software not to use x2APIC mode.
    X2apicOptOut = 1 << 1,
    /// The platform asks software to protect it from DMA (of external devices) early.
    DmaCtrlPlatformOptIn = 1 << 2,
}

/// DMA remapping reporting table (§8.1).
#[derive(Debug)]
#[allow(clippy::upper_case_acronyms)] // As the tables of `acpi_tables`.
pub struct DMAR {
    oem_id: [u8; 6],
    oem_table_id: [u8; 8],
    oem_revision: u32,
    host_address_width: u8,
    flags: u8,
    structures: Vec<u8>,
}

impl DMAR {
    /// Offset of the remapping structures.
    const HEADER_LENGTH: u32 = 48;
    const REVISION: u8 = 1;
    const HOST_ADDRESS_WIDTH: usize = 36;
    const FLAGS: usize = 37;

    /// A table without remapping structures. `host_address_width` is the number of address bits
    /// that DMA can reach, 1 to 256.
    pub fn new(
        oem_id: [u8; 6],
        oem_table_id: [u8; 8],
        oem_revision: u32,
        host_address_width: u8,
    ) -> Self {
        Self {
            oem_id,
            oem_table_id,
            oem_revision,
            host_address_width,
            flags: 0,
            structures: Vec::new(),
        }
    }

    /// Sets a flag.
    pub fn flag(mut self, flag: Flags) -> Self {
        self.flags |= flag as u8;
        self
    }

    /// Adds a remapping structure. All structures of one type go together, in the order of their
    /// types (§8.2).
    pub fn add_structure(&mut self, structure: impl RemappingStructure) {
        structure.to_aml_bytes(&mut self.structures);
    }
}

impl Aml for DMAR {
    fn to_aml_bytes(&self, sink: &mut dyn AmlSink) {
        let mut sdt = Sdt::new(
            *b"DMAR",
            Self::HEADER_LENGTH,
            Self::REVISION,
            self.oem_id,
            self.oem_table_id,
            self.oem_revision,
        );
        sdt.write_u8(Self::HOST_ADDRESS_WIDTH, self.host_address_width.wrapping_sub(1));
        sdt.write_u8(Self::FLAGS, self.flags);
        sdt.append_slice(&self.structures);
        sink.vec(sdt.as_slice());
    }
}

/// A part of a [`DMAR`].
pub trait RemappingStructure: Aml {}

/// Writes a remapping structure: its type, its length, `fields`, and `scopes`.
fn write_structure(
    sink: &mut dyn AmlSink,
    kind: StructureType,
    fields: &[u8],
    scopes: &[DeviceScope],
) {
    let mut body = fields.to_vec();
    for scope in scopes {
        scope.to_aml_bytes(&mut body);
    }
    const TYPE_AND_LENGTH: usize = 4;
    sink.word(kind as u16);
    sink.word((TYPE_AND_LENGTH + body.len()) as u16);
    sink.vec(&body);
}

/// DMA remapping hardware unit definition (§8.3).
#[derive(Debug, Clone)]
pub struct Drhd {
    segment: u16,
    register_base: u64,
    include_pci_all: bool,
    scopes: Vec<DeviceScope>,
}

impl Drhd {
    /// A unit for PCI segment `segment`, with its registers at `register_base`.
    pub fn new(segment: u16, register_base: u64) -> Self {
        Self { segment, register_base, include_pci_all: false, scopes: Vec::new() }
    }

    /// Puts behind the unit every PCI function of its segment that is in no other scope; its own
    /// scopes then list only IOAPICs and HPETs.
    pub fn include_pci_all(mut self) -> Self {
        self.include_pci_all = true;
        self
    }

    /// Puts a device behind the unit.
    pub fn add_scope(&mut self, scope: DeviceScope) {
        self.scopes.push(scope);
    }
}

impl Aml for Drhd {
    fn to_aml_bytes(&self, sink: &mut dyn AmlSink) {
        let mut fields = Vec::new();
        fields.byte(self.include_pci_all.into());
        // Size: one page of registers.
        fields.byte(0);
        fields.word(self.segment);
        fields.qword(self.register_base);
        write_structure(sink, StructureType::Drhd, &fields, &self.scopes);
    }
}

impl RemappingStructure for Drhd {}

/// Reserved memory region reporting (§8.4): memory that devices keep using when the operating
/// system takes over.
#[derive(Debug, Clone)]
pub struct Rmrr {
    segment: u16,
    base: u64,
    limit: u64,
    scopes: Vec<DeviceScope>,
}

impl Rmrr {
    /// The memory from `base` to `limit`, the last byte, in whole pages.
    pub fn new(segment: u16, base: u64, limit: u64) -> Self {
        Self { segment, base, limit, scopes: Vec::new() }
    }

    /// Adds a device that uses the memory.
    pub fn add_scope(&mut self, scope: DeviceScope) {
        self.scopes.push(scope);
    }
}

impl Aml for Rmrr {
    fn to_aml_bytes(&self, sink: &mut dyn AmlSink) {
        let mut fields = Vec::new();
        fields.word(0);
        fields.word(self.segment);
        fields.qword(self.base);
        fields.qword(self.limit);
        write_structure(sink, StructureType::Rmrr, &fields, &self.scopes);
    }
}

impl RemappingStructure for Rmrr {}

/// Root port ATS capability reporting (§8.5).
#[derive(Debug, Clone)]
pub struct Atsr {
    segment: u16,
    all_ports: bool,
    scopes: Vec<DeviceScope>,
}

impl Atsr {
    /// Without root ports of `segment` yet.
    pub fn new(segment: u16) -> Self {
        Self { segment, all_ports: false, scopes: Vec::new() }
    }

    /// ATS works behind all root ports of the segment, whatever the scopes.
    pub fn all_ports(mut self) -> Self {
        self.all_ports = true;
        self
    }

    /// ATS works behind this root port.
    pub fn add_scope(&mut self, scope: DeviceScope) {
        self.scopes.push(scope);
    }
}

impl Aml for Atsr {
    fn to_aml_bytes(&self, sink: &mut dyn AmlSink) {
        let mut fields = Vec::new();
        fields.byte(self.all_ports.into());
        fields.byte(0);
        fields.word(self.segment);
        write_structure(sink, StructureType::Atsr, &fields, &self.scopes);
    }
}

impl RemappingStructure for Atsr {}

/// Remapping hardware static affinity (§8.6).
#[derive(Debug, Clone, Copy)]
pub struct Rhsa {
    register_base: u64,
    proximity_domain: u32,
}

impl Rhsa {
    /// The unit with its registers at `register_base` belongs to `proximity_domain`.
    pub fn new(register_base: u64, proximity_domain: u32) -> Self {
        Self { register_base, proximity_domain }
    }
}

impl Aml for Rhsa {
    fn to_aml_bytes(&self, sink: &mut dyn AmlSink) {
        let mut fields = Vec::new();
        fields.dword(0);
        fields.qword(self.register_base);
        fields.dword(self.proximity_domain);
        write_structure(sink, StructureType::Rhsa, &fields, &[]);
    }
}

impl RemappingStructure for Rhsa {}

/// Device scope types (§8.3.1).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
enum ScopeType {
    PciEndpoint = 1,
    PciSubHierarchy = 2,
    IoApic = 3,
    MsiCapableHpet = 4,
}

/// A device (§8.3.1).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DeviceScope {
    kind: ScopeType,
    enumeration_id: u8,
    path: PciPath,
}

impl DeviceScope {
    /// A PCI function.
    pub fn pci_endpoint(path: PciPath) -> Self {
        Self { kind: ScopeType::PciEndpoint, enumeration_id: 0, path }
    }

    /// A bridge, and all that is below it.
    pub fn pci_sub_hierarchy(path: PciPath) -> Self {
        Self { kind: ScopeType::PciSubHierarchy, enumeration_id: 0, path }
    }

    /// The IOAPIC with `id` in the MADT, whose interrupt requests come from `path`.
    pub fn ioapic(id: u8, path: PciPath) -> Self {
        Self { kind: ScopeType::IoApic, enumeration_id: id, path }
    }

    /// The HPET with this number, whose interrupt requests come from `path`.
    pub fn msi_capable_hpet(number: u8, path: PciPath) -> Self {
        Self { kind: ScopeType::MsiCapableHpet, enumeration_id: number, path }
    }
}

impl Aml for DeviceScope {
    fn to_aml_bytes(&self, sink: &mut dyn AmlSink) {
        const WITHOUT_PATH: usize = 6;
        sink.byte(self.kind as u8);
        sink.byte((WITHOUT_PATH + 2 * self.path.hops.len()) as u8);
        sink.word(0);
        sink.byte(self.enumeration_id);
        sink.byte(self.path.start_bus);
        for (device, function) in &self.path.hops {
            sink.byte(*device);
            sink.byte(*function);
        }
    }
}

/// The path to a PCI function: the start bus, then device and function of every bridge on the way
/// and of the function itself. It stays valid when bridges get other bus numbers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PciPath {
    start_bus: u8,
    hops: Vec<(u8, u8)>,
}

impl PciPath {
    /// A function on `start_bus`.
    pub fn new(start_bus: u8, device: u8, function: u8) -> Self {
        Self { start_bus, hops: vec![(device, function)] }
    }

    /// Extends the path through the bridge that it leads to, to a function on its other side.
    pub fn then(mut self, device: u8, function: u8) -> Self {
        self.hops.push((device, function));
        self
    }
}

#[cfg(test)]
mod tests {
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
}
