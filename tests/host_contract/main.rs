// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! One contract for every host: the same checks on the emulated host and on `/dev/iommu`.
//!
//! A kernel's host needs a device: QEMU's `edu`, bound to vfio-pci. Without
//! `TWOSTAGE_CONTRACT_DEVICE` the test reports that it is skipped.
//!
//!   TWOSTAGE_CONTRACT_DEVICE=/dev/vfio/devices/vfio0 host_contract --exact kernel --nocapture

mod contract;

use twostage::spec::pci::Bdf;
use twostage_emulated::{
    DeviceConfig, DmaAttributes, DmaPort, EmulatedHost, EmulatedUnit, SmmuV3Unit, SmmuV3UnitConfig,
    VtdUnit, VtdUnitConfig,
};

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

fn subject(unit: impl Into<EmulatedUnit>) -> Subject {
    let host = EmulatedHost::new();
    let unit = host.add_unit(unit);
    let rid = Bdf::new(0, 4, 0).expect("a PCI address");
    host.add_device(NAME, unit, rid, DeviceConfig::default()).expect("a new device");
    let port = host.dma_port(NAME).expect("the device");
    Subject {
        host: host.clone(),
        device: NAME.to_owned(),
        engine: Box::new(move |_| Box::new(Port { port: port.clone(), buffer: [0; 8] })),
    }
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
