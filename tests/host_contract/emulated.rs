// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The emulated host and its device.

use twostage::spec::pci::Bdf;
use twostage_emulated::{
    DeviceConfig, DmaAttributes, DmaPort, EmulatedHost, EmulatedUnit, SmmuV3Unit, SmmuV3UnitConfig,
    VtdUnit, VtdUnitConfig,
};

use crate::contract::{Engine, Subject};

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
pub fn vtd() -> Subject {
    subject(VtdUnit::new(VtdUnitConfig::default()))
}

/// The same behind a VT-d that cannot nest.
pub fn vtd_without_nesting() -> Subject {
    subject(VtdUnit::new(VtdUnitConfig { nesting: false, ..Default::default() }))
}

/// The same behind an SMMUv3.
pub fn smmuv3() -> Subject {
    subject(SmmuV3Unit::new(SmmuV3UnitConfig::default()))
}

/// The same behind an SMMUv3 that cannot nest.
pub fn smmuv3_without_nesting() -> Subject {
    subject(SmmuV3Unit::new(SmmuV3UnitConfig { nesting: false, ..Default::default() }))
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
