// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The mock driver: an IOMMU that translates nothing, with caches that can be inspected; and the
//! devices behind it.

use std::any::Any;
use std::sync::Arc;

use zerocopy::IntoBytes;

use super::abi;
use super::devices::{MockDevices, MockVdevices};
use super::domain::{MockNested, MockPaging};
use super::viommu::MockViommu;
use crate::drivers::{
    Domain, Driver, DriverInfo, NestedDomain, PagingDomain, UserData, ViommuDriver, ViommuRequest,
};
use crate::host::device::{DeviceConfig, Requester, Slot};
use crate::host::machine::{Machine, Part};
use crate::host::refusal::{refuse, Outcome};
use crate::units::stage2::Stage2;
use crate::EmulatedHost;
use twostage::iommufd::{Errno, HwptFlags, ObjectId};

/// The driver of a machine's mock IOMMU.
#[derive(Debug, Default)]
pub struct MockDriver {
    devices: Arc<MockDevices>,
}

impl MockDriver {
    /// The devices behind the IOMMU.
    pub fn devices(&self) -> &MockDevices {
        &self.devices
    }

    /// Checks and records an attachment of `device` itself.
    fn attach_rid(&self, device: &Requester, new: &Domain) -> Outcome<()> {
        let nested = new.nested.as_deref().and_then(mock_nested);
        let known = nested.and_then(MockNested::vdevices);
        let virtual_id = match known.map(|vdevices| (vdevices, vdevices.virt_id(device.rid))) {
            Some((vdevices, Some(virt_id))) => Some((vdevices.clone(), virt_id)),
            Some((_, None)) => {
                return refuse(Errno::ENOENT, "the vIOMMU of the tables does not know the device");
            }
            None => None,
        };
        self.devices.change(device.rid, |device| {
            if nested.is_none() && new.paging.dirty_log().is_some() && !device.dirty_tracking {
                return refuse(Errno::EINVAL, "the device has no dirty tracking");
            }
            // A new ID under the same vIOMMU is not noticed, as in Linux.
            let same = |virtual_id: &Option<(Arc<MockVdevices>, u64)>| {
                virtual_id.as_ref().map(|(vdevices, _)| Arc::as_ptr(vdevices))
            };
            if same(&device.virtual_id) != same(&virtual_id) {
                device.virtual_id = virtual_id;
            }
            Ok(())
        })
    }

    /// Every other attachment to the reserved PASID fails.
    fn attach_pasid(&self, device: &Requester, pasid: u32) -> Outcome<()> {
        if pasid != abi::IOMMU_TEST_PASID_RESERVED {
            return Ok(());
        }
        self.devices.change(device.rid, |device| {
            device.pasid_fails = !device.pasid_fails;
            if !device.pasid_fails {
                return refuse(Errno::ENOMEM, "the second attachment to this PASID fails");
            }
            Ok(())
        })
    }
}

impl Driver for MockDriver {
    fn info(&self) -> DriverInfo {
        let info = abi::HwInfo { flags: 0, test_reg: abi::IOMMU_HW_INFO_SELFTEST_REGVAL };
        DriverInfo::Other {
            data_type: abi::IOMMU_HW_INFO_TYPE_SELFTEST,
            bytes: info.as_bytes().to_vec(),
        }
    }

    fn pasid_bits(&self) -> u8 {
        abi::MOCK_PASID_WIDTH
    }

    fn dirty_tracking(&self, device: &Requester) -> bool {
        self.devices.change(device.rid, |device| Ok(device.dirty_tracking)).unwrap_or(false)
    }

    fn alloc_paging(
        &self,
        device: &Requester,
        flags: HwptFlags,
        data: Option<&dyn UserData>,
    ) -> Outcome<Arc<dyn PagingDomain>> {
        Ok(Arc::new(MockPaging::new(flags, data, self.dirty_tracking(device))?))
    }

    fn alloc_nested(
        &self,
        _: &Requester,
        _: &Arc<dyn PagingDomain>,
        _: HwptFlags,
        data: &dyn UserData,
    ) -> Outcome<Arc<dyn NestedDomain>> {
        Ok(Arc::new(MockNested::new(None, data)?))
    }

    fn has_viommu(&self, kind: u32) -> bool {
        kind == abi::IOMMU_VIOMMU_TYPE_SELFTEST
    }

    fn alloc_viommu(&self, request: &ViommuRequest<'_>) -> Outcome<Arc<dyn ViommuDriver>> {
        Ok(Arc::new(MockViommu::new(self.devices.clone(), request)?))
    }

    fn user_pasid_table(&self) -> bool {
        true
    }

    /// Mock devices are in separate groups, so there is at most one of `devices`.
    fn attach(
        &self,
        devices: &[&Requester],
        slot: Slot,
        new: &Domain,
        _: Option<&Domain>,
    ) -> Outcome<()> {
        devices.iter().try_for_each(|device| match slot {
            None => self.attach_rid(device, new),
            Some(pasid) => self.attach_pasid(device, pasid),
        })
    }

    fn detach(&self, devices: &[&Requester], slot: Slot, _: &Domain) {
        for device in devices {
            // Fails if the device was removed.
            let _ = self.devices.change(device.rid, |device| {
                match slot {
                    None => device.virtual_id = None,
                    Some(abi::IOMMU_TEST_PASID_RESERVED) => device.pasid_fails = false,
                    Some(_) => {}
                }
                Ok(())
            });
        }
    }

    fn block(&self, _: &Requester) {}

    fn removed(&self, device: &Requester) {
        self.devices.remove(device.rid);
    }

    fn stage2_changed(&self, _: &Arc<Stage2>) {}
}

/// `domain`, if it is the mock driver's.
pub fn mock_nested(domain: &dyn NestedDomain) -> Option<&MockNested> {
    (domain as &dyn Any).downcast_ref()
}

/// `domain`, if it is the mock driver's.
pub fn mock_paging(domain: &dyn PagingDomain) -> Option<&MockPaging> {
    (domain as &dyn Any).downcast_ref()
}

/// The mock device `dev`, and its driver.
///
/// # Errors
/// `ENOENT` there is no such device; `EINVAL` it is another driver's.
pub fn with_driver<T>(
    host: &EmulatedHost,
    dev: ObjectId,
    with: impl FnOnce(&MockDriver, &Part) -> Outcome<T>,
) -> Outcome<T> {
    let part: Arc<Part> = host.objects().table().device(dev)?.part.clone();
    match (&*part.driver as &dyn Any).downcast_ref::<MockDriver>() {
        Some(driver) => with(driver, &part),
        None => refuse(Errno::EINVAL, format!("device {dev} is not a mock device")),
    }
}

/// Adds a mock device with `flags` (`MOCK_FLAGS_DEVICE_*`); returns its name. The first one also
/// adds the IOMMU.
///
/// # Errors
/// `EINVAL` unknown flags; `ENOSPC` there are too many.
pub fn add_mock_device(machine: &Machine, flags: u32) -> Outcome<String> {
    const KNOWN: u32 = abi::MOCK_FLAGS_DEVICE_NO_DIRTY | abi::MOCK_FLAGS_DEVICE_PASID;
    if flags & !KNOWN != 0 {
        return refuse(Errno::EINVAL, format!("mock devices have no flags {:#x}", flags & !KNOWN));
    }
    let (unit, driver) = machine.unit_of::<MockDriver>();
    let rid = driver.devices().add(flags & abi::MOCK_FLAGS_DEVICE_NO_DIRTY == 0)?;
    let pasid = flags & abi::MOCK_FLAGS_DEVICE_PASID != 0;
    let pasid_bits = if pasid { abi::MOCK_PASID_WIDTH } else { 0 };
    let config = DeviceConfig { pasid_bits, ..DeviceConfig::default() };
    let name = format!("iommufd_mock{}", rid.raw());
    match machine.add_device(&name, unit, rid, config) {
        Ok(()) => Ok(name),
        Err(error) => {
            driver.devices().remove(rid);
            refuse(Errno::EBUSY, error.to_string())
        }
    }
}
