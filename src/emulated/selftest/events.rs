// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Acting as a device with page requests, and a vIOMMU with events.

use std::any::Any;
use std::sync::Arc;

use super::abi::TriggerIopf;
use super::driver::MockDriver;
use crate::host::machine::Part;
use crate::host::refusal::{refuse, Outcome};
use crate::EmulatedHost;
use twostage::iommufd::{Errno, ObjectId, PageRequest, PageRequestFlags, PageRequestPermissions};

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

/// `TRIGGER_IOPF`: the device sends a page request, in a group of one. It gets no error if nobody
/// serves it.
pub fn page_request(host: &EmulatedHost, body: &TriggerIopf) -> Outcome<()> {
    let &TriggerIopf { dev_id, pasid, grpid, perm, addr } = body;
    let dev = ObjectId(dev_id);
    with_driver(host, dev, |_, _| Ok(()))?;
    let request = PageRequest {
        flags: PageRequestFlags::new().with_last_page(true).with_pasid_valid(pasid != 0),
        pasid,
        group: grpid,
        permissions: PageRequestPermissions::from_bits(perm),
        address: addr,
    };
    match host.objects().page_request(dev, request) {
        Err(refusal) if refusal.errno == Errno::EINVAL => Ok(()),
        outcome => outcome,
    }
}

/// `TRIGGER_VEVENT`: an event of the device, with the guest's ID.
pub fn vevent(host: &EmulatedHost, dev: ObjectId) -> Outcome<()> {
    with_driver(host, dev, |driver, part| {
        let rid = part.requester.rid;
        match driver.devices().change(rid, |device| Ok(device.virtual_id.clone()))? {
            // In Linux 0 means "none".
            Some((vdevices, virt_id)) if virt_id != 0 => vdevices.report(virt_id),
            _ => refuse(Errno::ENOENT, format!("no vIOMMU knows device {dev}")),
        }
    })
}
