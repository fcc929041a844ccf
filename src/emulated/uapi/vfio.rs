// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The ioctls of a VFIO device that concern iommufd: bind, attach, detach.

use std::collections::BTreeSet;
use std::mem::{offset_of, size_of};
use std::sync::Arc;
use twostage::sync::Mutex;

use super::argument::Argument;
use super::Process;
use crate::host::context::Context;
use crate::host::device::Slot;
use crate::host::objects::Change;
use crate::host::refusal::{refuse, Outcome};
use crate::Machine;
use twostage::iommufd::{Errno, ObjectId};
use vfio_bindings::bindings::vfio::{
    vfio_device_attach_iommufd_pt as Attach, vfio_device_bind_iommufd as Bind,
    vfio_device_detach_iommufd_pt as Detach, VFIO_BASE, VFIO_DEVICE_ATTACH_PASID as FLAG_PASID,
    VFIO_DEVICE_BIND_FLAG_TOKEN as FLAG_TOKEN, VFIO_TYPE,
};

/// The number of an ioctl of `linux/vfio.h`: `_IO(VFIO_TYPE, VFIO_BASE + n)`.
pub const fn vfio_request(n: u32) -> u32 {
    (VFIO_TYPE as u32) << 8 | (VFIO_BASE + n)
}

/// `VFIO_DEVICE_BIND_IOMMUFD`.
pub const BIND_IOMMUFD: u32 = vfio_request(18);
/// `VFIO_DEVICE_ATTACH_IOMMUFD_PT`.
pub const ATTACH_IOMMUFD_PT: u32 = vfio_request(19);
/// `VFIO_DEVICE_DETACH_IOMMUFD_PT`.
pub const DETACH_IOMMUFD_PT: u32 = vfio_request(20);
/// An open VFIO character device. Dropping it closes it: the device is detached and unbound.
#[derive(Debug)]
pub struct DeviceFile {
    machine: Arc<Machine>,
    name: String,
    bound: Mutex<Option<Bound>>,
}

/// A device's object, and the epoch of the iommufd that its ID belongs to. The iommufd stays open
/// while a device is bound to it.
#[derive(Debug)]
struct Bound {
    context: Arc<Context>,
    epoch: u64,
    dev: ObjectId,
    /// VFIO's attachments, which decide between attach and replace. PASID 0 is separate here, but
    /// for iommufd it is the device itself.
    attached: BTreeSet<Slot>,
}

impl Bound {
    /// Whether the iommufd has not been forcibly closed since.
    fn lives(&self) -> bool {
        self.context.objects().epoch() == self.epoch
    }

    fn attach(&mut self, user: &mut [u8]) -> Outcome<()> {
        let (mut argument, pasid) = slot(user, offset_of!(Attach, pasid))?;
        let pt = argument.id(offset_of!(Attach, pt_id));
        if pasid.is_some_and(|pasid| i32::try_from(pasid).is_err()) {
            return refuse(Errno::ENOSPC, format!("PASID {pasid:x?} is not valid for VFIO"));
        }
        let attached = self.attached.contains(&pasid);
        let change = if attached { Change::Replace } else { Change::Attach };
        let mut objects = self.context.objects();
        let hwpt = objects.device_change(self.dev, of_iommufd(pasid), pt, change)?;
        self.attached.insert(pasid);
        argument.set_u32(offset_of!(Attach, pt_id), hwpt.0);
        argument.copy_out(user, offset_of!(Attach, pasid));
        Ok(())
    }

    fn detach(&mut self, user: &mut [u8]) -> Outcome<()> {
        let (_, pasid) = slot(user, offset_of!(Detach, pasid))?;
        if self.attached.remove(&pasid) {
            self.context.objects().device_detach(self.dev, of_iommufd(pasid))?;
        }
        Ok(())
    }
}

/// iommufd's slot for VFIO's: PASID 0 means "no PASID".
fn of_iommufd(pasid: Slot) -> Slot {
    pasid.filter(|pasid| *pasid != 0)
}

impl Machine {
    /// Opens the character device of `name`.
    ///
    /// # Errors
    /// `ENODEV` there is no such device.
    pub fn open_device(self: &Arc<Self>, name: &str) -> Result<DeviceFile, Errno> {
        self.part(name).map_err(|refusal| refusal.errno)?;
        let (machine, name) = (self.clone(), name.to_owned());
        Ok(DeviceFile { machine, name, bound: Mutex::new(None) })
    }
}

impl DeviceFile {
    /// `ioctl(2)` on the device. Descriptors in the argument are `process`'s.
    ///
    /// # Errors
    /// Linux's; `EINVAL` for everything but binding before the device is bound.
    pub fn ioctl(
        &self,
        request: u32,
        argument: &mut [u8],
        process: &dyn Process,
    ) -> Result<(), Errno> {
        let mut bound = self.bound.lock();
        if bound.as_ref().is_some_and(|bound| !bound.lives()) {
            *bound = None;
        }
        let outcome = match (request, &mut *bound) {
            (BIND_IOMMUFD, _) => self.bind(&mut bound, argument, process),
            (_, None) => refuse(Errno::EINVAL, "the device is not bound"),
            (ATTACH_IOMMUFD_PT, Some(bound)) => bound.attach(argument),
            (DETACH_IOMMUFD_PT, Some(bound)) => bound.detach(argument),
            _ => refuse(Errno::ENOTTY, "no such ioctl"),
        };
        outcome.map_err(|refusal| {
            log::debug!("ioctl {request:#x} of {}: {}", self.name, refusal.detail);
            refusal.errno
        })
    }

    fn bind(
        &self,
        bound: &mut Option<Bound>,
        argument: &mut [u8],
        process: &dyn Process,
    ) -> Outcome<()> {
        const MIN_SIZE: usize = offset_of!(Bind, token_uuid_ptr);
        let declared = size(argument)?;
        let mut copy = copy_in(argument, declared, size_of::<Bind>(), MIN_SIZE)?;
        let iommufd = i32::from_ne_bytes(copy.bytes(offset_of!(Bind, iommufd)));
        let flags = copy.u32(offset_of!(Bind, flags));
        if flags & !FLAG_TOKEN != 0 || iommufd < 0 {
            return refuse(Errno::EINVAL, "unknown flags, or no iommufd");
        }
        if bound.is_some() {
            return refuse(Errno::EINVAL, "the device is bound already");
        }
        if flags & FLAG_TOKEN != 0 {
            // For owners of PFs and their VFs, which emulated devices are not.
            let mut token = [0; 16];
            process.read(copy.u64(offset_of!(Bind, token_uuid_ptr)), &mut token)?;
            return refuse(Errno::EINVAL, "a token for a device that is no PF or VF");
        }
        let host = process
            .iommufd(iommufd)
            .or_else(|errno| refuse(errno, format!("descriptor {iommufd}")))?;
        if !Arc::ptr_eq(host.machine(), &self.machine) {
            return refuse(Errno::ENODEV, "the iommufd belongs to another machine");
        }
        let mut objects = host.objects();
        let dev = match host.context().device_bind(&mut objects, &self.name) {
            Ok(dev) => dev,
            // Through another descriptor: VFIO's own error.
            Err(refusal) if refusal.errno == Errno::EBUSY => {
                return refuse(Errno::EINVAL, refusal.detail);
            }
            Err(refusal) => return Err(refusal),
        };
        let epoch = objects.epoch();
        drop(objects);
        *bound =
            Some(Bound { context: host.context().clone(), epoch, dev, attached: BTreeSet::new() });
        copy.set_u32(offset_of!(Bind, out_devid), dev.0);
        copy.copy_out(argument, declared);
        Ok(())
    }
}

impl Drop for DeviceFile {
    fn drop(&mut self) {
        let bound = self.bound.get_mut().take();
        if let Some(bound) = bound.filter(Bound::lives) {
            // Fails only if the device was unbound otherwise.
            let _ = bound.context.objects().device_unbind(bound.dev);
        }
    }
}

/// The structure of an attach or a detach, and the PASID at `pasid_offset` if its flags say that it
/// has one. The structure's first version ended there; bytes after the PASID are ignored.
fn slot(user: &[u8], pasid_offset: usize) -> Outcome<(Argument, Option<u32>)> {
    let first_version = copy_in(user, pasid_offset, pasid_offset, pasid_offset)?;
    let declared = size(user)?;
    if declared < pasid_offset {
        return refuse(Errno::EINVAL, format!("argsz {declared}"));
    }
    let flags = first_version.u32(offset_of!(Attach, flags));
    if flags & !FLAG_PASID != 0 {
        return refuse(Errno::EINVAL, format!("flags {flags:#x}"));
    }
    if flags & FLAG_PASID == 0 {
        return Ok((first_version, None));
    }
    let full = pasid_offset + size_of::<u32>();
    if declared < full {
        return refuse(Errno::EINVAL, format!("argsz {declared} has no room for a PASID"));
    }
    let argument = copy_in(user, full, full, full)?;
    let pasid = argument.u32(pasid_offset);
    Ok((argument, Some(pasid)))
}

fn size(user: &[u8]) -> Outcome<usize> {
    Argument::declared_size(user).or_else(|errno| refuse(errno, "argsz"))
}

fn copy_in(user: &[u8], declared: usize, size: usize, min_size: usize) -> Outcome<Argument> {
    Argument::copy_in(user, declared, size, min_size)
        .or_else(|errno| refuse(errno, format!("a structure of {declared} bytes")))
}
