// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Mock devices as objects: each belongs to an object that represents the program that has it.

use std::ops::RangeInclusive;

use super::device::Change;
use super::object::{Object, Selftest};
use super::Objects;
use crate::host::device::Slot;
use crate::host::refusal::Outcome;
use twostage::iommufd::ObjectId;

/// The IDs of a new mock device.
#[derive(Debug)]
pub(crate) struct MockDeviceIds {
    pub selftest: ObjectId,
    pub dev: ObjectId,
    pub hwpt: ObjectId,
}

impl Objects {
    /// Binds the mock device `name`, and attaches it to `pt`. Removes the device from the machine
    /// if that fails.
    pub fn add_mock_device(&mut self, name: &str, pt: ObjectId) -> Outcome<MockDeviceIds> {
        // Linux creates the objects in this order, which determines the IDs. They are not visible
        // before the end.
        let selftest = Selftest { dev: ObjectId(0), name: name.to_owned() };
        let inserted = self.table.insert(Object::Selftest(selftest));
        let selftest = inserted.inspect_err(|_| self.remove_mock_device(name))?;
        let attached = self.device_bind(name).and_then(|dev| {
            if let Ok(object) = self.table.selftest_mut(selftest) {
                object.dev = dev;
            }
            Ok((dev, self.device_change(dev, None, pt, Change::Attach)?))
        });
        match attached {
            Ok((dev, hwpt)) => Ok(MockDeviceIds { selftest, dev, hwpt }),
            Err(refusal) => {
                self.destroy(selftest)?;
                Err(refusal)
            }
        }
    }

    /// Attaches `slot` of the mock device of `selftest` to the page table `pt`.
    pub fn change_mock(
        &mut self,
        selftest: ObjectId,
        slot: Slot,
        pt: ObjectId,
        change: Change,
    ) -> Outcome<ObjectId> {
        let dev = self.table.selftest(selftest)?.dev;
        self.device_change(dev, slot, pt, change)
    }

    /// Reserves IOVAs of `ioas` for its lifetime.
    ///
    /// # Errors
    /// `ENOENT` there is no such IOAS; `EADDRINUSE` something is mapped or allowed there.
    pub fn reserve_iovas(&mut self, ioas: ObjectId, range: RangeInclusive<u64>) -> Outcome<()> {
        let space = &mut self.table.ioas_mut(ioas)?.space;
        let range = [range];
        space.check_reservable(&range)?;
        // Owned by itself, so nothing removes the reservation.
        space.reserve(ioas, &range);
        Ok(())
    }

    /// Ends the device of `selftest`, if it still exists.
    pub(super) fn end_mock_device(&mut self, selftest: ObjectId) -> Outcome<()> {
        let Selftest { dev, ref name } = *self.table.selftest(selftest)?;
        let name = name.clone();
        // When the iommufd is closed, all devices are unbound before other objects are destroyed.
        if self.table.device(dev).is_ok() {
            self.device_unbind(dev)?;
        }
        self.remove_mock_device(&name);
        Ok(())
    }

    fn remove_mock_device(&self, name: &str) {
        // Fails if it is already removed.
        let _ = self.machine.remove_device(name);
    }
}
