// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! DMAR: describes Intel's DMA and interrupt remapping hardware, and what is behind it.
//!
//! Source: Intel Virtualization Technology for Directed I/O, §8 (BIOS considerations).
//!
//! In the style of `acpi_tables`, which has no DMAR.

use acpi_tables::sdt::Sdt;
use acpi_tables::{Aml, AmlSink};

use crate::spec::pci::Bdf;
use crate::viommu::bridges::{conventional, Bridge, BridgeKind};

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

    /// What is to be behind a unit for `function`, behind `bridges` in their order from the root
    /// bus on: the function; or, if it shares its Requester ID, the bridge that gives it, with all
    /// that is below.
    pub fn of_function(function: Bdf, bridges: &[Bridge]) -> Self {
        let path = |bridges: &[Bridge], last: Bdf| {
            let way = bridges.iter().map(|bridge| bridge.bdf).chain([last]);
            let hops: Vec<_> = way.map(|bdf| (bdf.device(), bdf.function())).collect();
            let start_bus = bridges.first().map_or(last, |bridge| bridge.bdf).bus();
            PciPath { start_bus, hops }
        };
        match conventional(bridges) {
            Some(shared) => {
                let ports = bridges.iter().take_while(|bridge| bridge.kind == BridgeKind::Port);
                let ports: Vec<_> = ports.copied().collect();
                Self::pci_sub_hierarchy(path(&ports, shared.bdf))
            }
            None => Self::pci_endpoint(path(bridges, function)),
        }
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
mod tests;
