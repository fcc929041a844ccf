// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! One contract for every host: the same checks on the emulated host and on `/dev/iommu`.
//!
//! A kernel's host needs a device: QEMU's `edu`, bound to vfio-pci. Without
//! `TWOSTAGE_CONTRACT_DEVICE` the test reports that it is skipped.
//!
//!   TWOSTAGE_CONTRACT_DEVICE=/dev/vfio/devices/vfio0 host_contract --exact kernel --nocapture

mod contract;

use std::sync::Arc;

use twostage::iommufd::{HostIommu, MapTarget, Protection};
use twostage::nesting::GuestIoas;
use twostage::spec::pci::Bdf;
use twostage_emulated::{
    DeviceConfig, DmaAttributes, DmaMemory, DmaPort, EmulatedHost, EmulatedUnit, SmmuV3Unit,
    SmmuV3UnitConfig, VtdUnit, VtdUnitConfig,
};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use contract::memory::Memory;
use contract::{Engine, Subject};

const NAME: &str = "edu";

/// A device's DMA by its port.
#[derive(Debug)]
struct Port {
    port: DmaPort,
    buffer: [u8; 8],
}

impl Engine for Port {
    fn load(&mut self, iova: u64) {
        // A blocked read does not change the buffer.
        let _ = self.port.read(DmaAttributes::default(), iova, &mut self.buffer);
    }

    fn store(&mut self, iova: u64) {
        let _ = self.port.write(DmaAttributes::default(), iova, &self.buffer);
    }
}

/// A device without PASIDs behind a VT-d.
fn vtd() -> Subject {
    subject(VtdUnit::new(VtdUnitConfig::default()))
}

/// The same behind a VT-d that cannot nest.
fn vtd_without_nesting() -> Subject {
    subject(VtdUnit::new(VtdUnitConfig::default().with_nesting(false)))
}

/// The same behind an SMMUv3.
fn smmuv3() -> Subject {
    subject(SmmuV3Unit::new(SmmuV3UnitConfig::default()))
}

/// The same behind an SMMUv3 that cannot nest.
fn smmuv3_without_nesting() -> Subject {
    subject(SmmuV3Unit::new(SmmuV3UnitConfig::default().with_nesting(false)))
}

fn machine(unit: impl Into<EmulatedUnit>) -> (Arc<EmulatedHost>, DmaPort) {
    let host = EmulatedHost::new();
    let unit = host.add_unit(unit);
    let rid = Bdf::new(0, 4, 0).expect("a PCI address");
    host.add_device(NAME, unit, rid, DeviceConfig::default()).expect("a new device");
    let port = host.dma_port(NAME).expect("the device");
    (host, port)
}

fn subject(unit: impl Into<EmulatedUnit>) -> Subject {
    let (host, port) = machine(unit);
    Subject {
        host,
        device: NAME.to_owned(),
        engine: Box::new(move |_| Box::new(Port { port: port.clone(), buffer: [0; 8] })),
    }
}

#[test]
fn a_section_reaches_a_vmms_own_memory_where_the_guest_has_it() {
    let (host, port) = machine(VtdUnit::new(VtdUnitConfig::default()));
    let ioas = GuestIoas::new(host.clone()).unwrap();
    let pieces = [0, 0x10_0000].map(|gpa| (gpa, Memory::at(gpa, 0x100)));
    let raw = |memory: &Memory| memory.raw(memory.owner());
    for (gpa, piece) in &pieces {
        ioas.map(*gpa, &raw(piece), Protection::READ_WRITE).unwrap();
    }
    let regions = pieces.iter().map(|(_, piece)| piece.region()).collect();
    let memory = GuestMemoryMmap::from_arc_regions(regions).unwrap();
    let dev = host.device_bind(NAME).unwrap();
    host.device_attach(dev, None, ioas.id()).unwrap();
    let mut device = DmaMemory::behind_iommu(memory.clone(), port);
    device.section().write_obj(7u8, GuestAddress(0x10_1000)).unwrap();
    let read = |gpa| memory.read_obj::<u8>(GuestAddress(gpa)).unwrap();
    assert_eq!([0x1000, 0x10_1000].map(read), [0, 7]);

    // Who maps it without saying where the guest has it learns that, and nothing is written.
    let elsewhere = MapTarget::Fixed(0x20_0000);
    let [_, (_, high)] = &pieces;
    host.ioas_map(ioas.id(), &raw(high), elsewhere, Protection::READ_WRITE).unwrap();
    let error = device.section().write_obj(8u8, GuestAddress(0x20_1000)).unwrap_err();
    assert!(error.to_string().contains("memory without a GPA"), "{error}");
    assert_eq!([0x1000, 0x10_1000].map(read), [0, 7]);
    device.write(0x20_1000, &[9]).unwrap();
    assert_eq!([0x1000, 0x10_1000].map(read), [0, 9]);
}

#[test]
fn emulated_vtd() {
    contract::check(&vtd());
}

#[test]
fn emulated_vtd_without_nesting() {
    contract::check(&vtd_without_nesting());
}

#[test]
fn emulated_smmuv3() {
    contract::check(&smmuv3());
}

#[test]
fn emulated_smmuv3_without_nesting() {
    contract::check(&smmuv3_without_nesting());
}

#[test]
fn kernel() {
    contract::check_kernel();
}
