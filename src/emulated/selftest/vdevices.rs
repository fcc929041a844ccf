// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The vDEVICEs of one vIOMMU of the mock driver.

use std::collections::BTreeMap;
use std::sync::{Arc, MutexGuard};
use twostage::sync::Mutex;

use super::abi;
use crate::host::events::ViommuEvents;
use crate::host::refusal::Outcome;
use twostage::spec::pci::Bdf;

/// The devices that the guest knows behind one vIOMMU, and who is told of what happens to them.
#[derive(Debug)]
pub struct MockVdevices {
    events: Arc<ViommuEvents>,
    /// By the id that the guest knows them by.
    devices: Mutex<BTreeMap<u64, Bdf>>,
}

impl MockVdevices {
    /// No vDEVICE yet; `events` is told of what happens.
    pub fn new(events: Arc<ViommuEvents>) -> Self {
        Self { events, devices: Mutex::default() }
    }

    /// From now on the guest knows the device `rid` by `virt_id`.
    pub fn add(&self, virt_id: u64, rid: Bdf) {
        self.devices().insert(virt_id, rid);
    }

    /// The guest knows no device by `virt_id` any more.
    pub fn remove(&self, virt_id: u64) {
        self.devices().remove(&virt_id);
    }

    /// The device that the guest knows by `virt_id`.
    pub fn device(&self, virt_id: u64) -> Option<Bdf> {
        self.devices().get(&virt_id).copied()
    }

    /// The id that the guest knows the device `rid` by.
    pub fn virt_id(&self, rid: Bdf) -> Option<u64> {
        self.devices().iter().find(|(_, known)| **known == rid).map(|(virt_id, _)| *virt_id)
    }

    /// Tells the user that something happened to the device it knows by `virt_id`.
    ///
    /// # Errors
    /// `EOPNOTSUPP` nobody wants to know.
    pub fn report(&self, virt_id: u64) -> Outcome<()> {
        // The structure of the event has 32 bits of it.
        let event = (virt_id as u32).to_ne_bytes();
        self.events.report(abi::IOMMU_VEVENTQ_TYPE_SELFTEST, &event)
    }

    fn devices(&self) -> MutexGuard<'_, BTreeMap<u64, Bdf>> {
        self.devices.lock()
    }
}
