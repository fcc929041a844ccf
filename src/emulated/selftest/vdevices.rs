// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The vDEVICEs of one vIOMMU of the mock driver.

use std::collections::BTreeMap;
use std::sync::{Arc, MutexGuard};
use twostage::sync::Mutex;

use super::abi;
use crate::host::events::ViommuEvents;
use crate::host::refusal::Outcome;
use twostage::spec::pci::Bdf;

/// The guest's devices of one vIOMMU, and the destination of their events.
#[derive(Debug)]
pub struct MockVdevices {
    events: Arc<ViommuEvents>,
    /// By the guest's ID.
    devices: Mutex<BTreeMap<u64, Bdf>>,
}

impl MockVdevices {
    /// No vDEVICE yet; events go to `events`.
    pub fn new(events: Arc<ViommuEvents>) -> Self {
        Self { events, devices: Mutex::default() }
    }

    /// The guest knows the device `rid` by `virt_id` from now on.
    pub fn add(&self, virt_id: u64, rid: Bdf) {
        self.devices().insert(virt_id, rid);
    }

    /// Removes the device `virt_id`.
    pub fn remove(&self, virt_id: u64) {
        self.devices().remove(&virt_id);
    }

    /// The device with the guest's ID `virt_id`.
    pub fn device(&self, virt_id: u64) -> Option<Bdf> {
        self.devices().get(&virt_id).copied()
    }

    /// The guest's ID of the device `rid`.
    pub fn virt_id(&self, rid: Bdf) -> Option<u64> {
        self.devices().iter().find(|(_, known)| **known == rid).map(|(virt_id, _)| *virt_id)
    }

    /// Reports an event of the device `virt_id`.
    ///
    /// # Errors
    /// `EOPNOTSUPP` there is no queue for it.
    pub fn report(&self, virt_id: u64) -> Outcome<()> {
        // The structure of the event has 32 bits of it.
        let event = (virt_id as u32).to_ne_bytes();
        self.events.report(abi::IOMMU_VEVENTQ_TYPE_SELFTEST, &event)
    }

    fn devices(&self) -> MutexGuard<'_, BTreeMap<u64, Bdf>> {
        self.devices.lock()
    }
}
