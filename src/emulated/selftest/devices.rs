// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Mock devices, for their driver, and the vDEVICEs of one vIOMMU.

use std::collections::BTreeMap;
use std::sync::{Arc, MutexGuard};
use twostage::sync::Mutex;

use super::abi;
use crate::host::events::ViommuEvents;
use crate::host::refusal::{refuse, Outcome};
use twostage::iommufd::Errno;
use twostage::spec::pci::Bdf;

/// One mock device.
#[derive(Debug)]
pub struct MockDevice {
    /// It supports dirty tracking.
    pub dirty_tracking: bool,
    /// Its translation cache.
    pub cache: [u32; abi::MOCK_DEV_CACHE_NUM],
    /// The vDEVICEs of the vIOMMU whose nested tables it is attached to, and its ID there.
    pub virtual_id: Option<(Arc<MockVdevices>, u64)>,
    /// The next attachment to [`abi::IOMMU_TEST_PASID_RESERVED`] fails.
    pub pasid_fails: bool,
}

/// All mock devices of a machine, by the number used as Requester ID.
#[derive(Debug, Default)]
pub struct MockDevices(Mutex<BTreeMap<u16, MockDevice>>);

impl MockDevices {
    /// Adds a device under the lowest free number.
    ///
    /// # Errors
    /// `ENOSPC` no number is free.
    pub fn add(&self, dirty_tracking: bool) -> Outcome<Bdf> {
        let mut devices = self.lock();
        let Some(number) = (0..=u16::MAX).find(|number| !devices.contains_key(number)) else {
            return refuse(Errno::ENOSPC, "the maximum number of mock devices is reached");
        };
        let device = MockDevice {
            dirty_tracking,
            cache: [abi::IOMMU_TEST_DEV_CACHE_DEFAULT; abi::MOCK_DEV_CACHE_NUM],
            virtual_id: None,
            pasid_fails: false,
        };
        devices.insert(number, device);
        Ok(Bdf::from_raw(number))
    }

    /// Removes a device.
    pub fn remove(&self, rid: Bdf) {
        self.lock().remove(&rid.raw());
    }

    /// Calls `with` with the device `rid`.
    ///
    /// # Errors
    /// `ENODEV` there is no such device; those of `with`.
    pub fn change<T>(
        &self,
        rid: Bdf,
        with: impl FnOnce(&mut MockDevice) -> Outcome<T>,
    ) -> Outcome<T> {
        match self.lock().get_mut(&rid.raw()) {
            Some(device) => with(device),
            None => refuse(Errno::ENODEV, format!("there is no mock device {rid}")),
        }
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<u16, MockDevice>> {
        self.0.lock()
    }
}

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
