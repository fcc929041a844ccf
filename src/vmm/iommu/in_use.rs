// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The host's objects while a guest uses them, for the report: guests switch translation off before
//! they end, and nothing is to be seen of it then.

use std::sync::Arc;
use twostage::sync::Mutex;

use crate::bus::BusDevice;
use twostage::spec::vtd::regs::{self, Gcmd};
use twostage::viommu::vtd::VtdIommu;
use twostage_emulated::{EmulatedHost, ObjectGraph};

/// The most objects that there were when a guest switched translation off.
#[derive(Debug)]
pub(super) struct ObjectsInUse {
    host: Option<Arc<EmulatedHost>>,
    most: Mutex<Option<ObjectGraph>>,
}

impl ObjectsInUse {
    /// Those of `host`; of a kernel nothing is to be seen.
    pub fn new(host: Option<Arc<EmulatedHost>>) -> Self {
        Self { host, most: Mutex::new(None) }
    }

    /// The objects, once a guest has switched translation off.
    pub fn most(&self) -> Option<ObjectGraph> {
        self.most.lock().clone()
    }

    /// A guest is about to switch translation off.
    pub fn note(&self) {
        let Some(graph) = self.host.as_ref().map(|host| host.graph()) else { return };
        let mut most = self.most.lock();
        // Of several units the first one to go shows the objects of all.
        if most.as_ref().is_none_or(|most| most.objects.len() <= graph.objects.len()) {
            *most = Some(graph);
        }
    }
}

/// The register page of a virtual VT-d as a bus device.
pub(super) struct RegisterPage {
    pub vtd: Arc<VtdIommu>,
    pub in_use: Arc<ObjectsInUse>,
}

impl RegisterPage {
    /// Whether the write switches translation off, which is on.
    fn switches_off(&self, offset: u64, data: &[u8]) -> bool {
        let Ok(command) = <[u8; 4]>::try_from(data) else { return false };
        offset == regs::GCMD
            && !Gcmd::from_bits(u32::from_le_bytes(command)).te()
            && self.vtd.state().registers.gsts.tes()
    }
}

impl BusDevice for RegisterPage {
    fn read(&self, offset: u64, data: &mut [u8]) {
        self.vtd.mmio_read(offset, data);
    }

    fn write(&self, offset: u64, data: &[u8]) {
        if self.switches_off(offset, data) {
            self.in_use.note();
        }
        self.vtd.mmio_write(offset, data);
    }
}
