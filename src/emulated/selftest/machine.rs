// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The mock IOMMU of a machine, and the devices behind it.

use std::sync::{Arc, OnceLock, Weak};
use twostage::sync::Mutex;

use super::abi;
use super::driver::MockDriver;
use crate::host::context::Context;
use crate::host::device::DeviceConfig;
use crate::host::machine::{Machine, UnitId};
use crate::host::refusal::{refuse, Outcome};
use twostage::iommufd::Errno;

/// What a machine has for Linux's own tests.
#[derive(Debug, Default)]
pub struct Selftest {
    /// Made when it is first asked for.
    unit: OnceLock<(UnitId, Arc<MockDriver>)>,
    /// Every iommufd that was opened on the machine and is not gone.
    contexts: Mutex<Vec<Weak<Context>>>,
}

impl Selftest {
    /// Notes an iommufd that is opened.
    pub fn opened(&self, context: &Arc<Context>) {
        let mut contexts = self.contexts.lock();
        contexts.retain(|context| context.strong_count() > 0);
        contexts.push(Arc::downgrade(context));
    }

    /// Every iommufd of the machine.
    pub fn contexts(&self) -> Vec<Arc<Context>> {
        let contexts = self.contexts.lock();
        contexts.iter().filter_map(Weak::upgrade).collect()
    }
}

impl Machine {
    /// The mock IOMMU.
    fn mock_unit(&self) -> &(UnitId, Arc<MockDriver>) {
        self.selftest.unit.get_or_init(|| {
            let driver = Arc::new(MockDriver::default());
            (self.add_driver(driver.clone()), driver)
        })
    }

    /// The driver of the mock IOMMU.
    pub(super) fn mock_driver(&self) -> &Arc<MockDriver> {
        &self.mock_unit().1
    }

    /// Adds a mock device with `flags` (`MOCK_FLAGS_DEVICE_*`); returns its name.
    ///
    /// # Errors
    /// `EINVAL` unknown flags; `ENOSPC` there are too many.
    pub(super) fn add_mock_device(&self, flags: u32) -> Outcome<String> {
        const KNOWN: u32 = abi::MOCK_FLAGS_DEVICE_NO_DIRTY | abi::MOCK_FLAGS_DEVICE_PASID;
        if flags & !KNOWN != 0 {
            return refuse(
                Errno::EINVAL,
                format!("mock devices have no flags {:#x}", flags & !KNOWN),
            );
        }
        let (unit, driver) = self.mock_unit();
        let rid = driver.devices().add(flags & abi::MOCK_FLAGS_DEVICE_NO_DIRTY == 0)?;
        let pasid = flags & abi::MOCK_FLAGS_DEVICE_PASID != 0;
        let pasid_bits = if pasid { abi::MOCK_PASID_WIDTH } else { 0 };
        let config = DeviceConfig { pasid_bits, ..DeviceConfig::default() };
        let name = format!("iommufd_mock{}", rid.raw());
        match self.add_device(&name, *unit, rid, config) {
            Ok(()) => Ok(name),
            Err(error) => {
                driver.devices().remove(rid);
                refuse(Errno::EBUSY, error.to_string())
            }
        }
    }

    /// Removes the mock device `name`, which is not bound.
    pub(crate) fn remove_mock_device(&self, name: &str) {
        let Ok(part) = self.part(name) else { return };
        // Its number is free only when the machine no longer has it.
        if self.remove_device(name).is_ok() {
            self.mock_driver().devices().remove(part.requester.rid);
        }
    }
}
