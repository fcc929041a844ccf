// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The devices behind the mock IOMMU of a machine.

use super::abi;
use super::driver::MockDriver;
use crate::host::device::DeviceConfig;
use crate::host::machine::Machine;
use crate::host::refusal::{refuse, Outcome};
use twostage::iommufd::Errno;

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
