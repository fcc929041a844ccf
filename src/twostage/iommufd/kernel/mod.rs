// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The kernel's host: `/dev/iommu` and VFIO's character devices.
//!
//! Linux's uAPI: ioctls through `iommufd-ioctls` if it has them, the others in its style
//! ([`ioctls`]). Errors explain the errno in its context.

mod device;
mod host;
mod ioctls;
mod meaning;
mod memory;
mod queues;
mod records;

use crate::sync::Mutex;
use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, MutexGuard};

use iommufd_ioctls::IommuFd;

use super::{Errno, HostError, HwInfo, ObjectId, Result, Verb};
use device::Device;
use ioctls::{errno_of, VfioCdev};
use memory::MappedMemory;

/// An open `/dev/iommu`.
///
/// A device is bound by the path of its VFIO character device (`/dev/vfio/devices/vfio0`) or of its
/// folder in sysfs (`/sys/bus/pci/devices/0000:01:00.0`).
///
/// Memory that an IOAS maps is kept until it is unmapped or the IOAS is destroyed. Dropping the
/// host detaches every device; each is unbound when its file is closed, after the last user of
/// [`KernelHost::device_file`], and the other objects are destroyed with the last file.
///
/// When a *replacing* attach fails, Linux's VT-d driver may have blocked the device, although
/// [`HostIommu`](crate::iommufd::HostIommu) promises that nothing has changed: callers detach then.
pub struct KernelHost {
    // Fields are closed in this order: unbinding ends the use of the iommufd, and memory is
    // released when the kernel can no longer look up its pages.
    devices: Mutex<BTreeMap<ObjectId, Device>>,
    iommufd: IommuFd,
    memory: Mutex<MappedMemory>,
}

/// There is no iommufd at the path.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// The path does not exist.
    #[error(
        "there is no {}: the kernel needs CONFIG_IOMMUFD and CONFIG_VFIO_DEVICE_CDEV, and as \
         modules they are iommufd and vfio-pci (modprobe)", .0.display()
    )]
    Absent(PathBuf),
    /// No permission.
    #[error("{} may not be opened: its owner or its mode does not allow it", .0.display())]
    Permission(PathBuf),
    /// Not an iommufd.
    #[error("{} is not an iommufd", .0.display())]
    NotIommufd(PathBuf),
    /// Another error of the open.
    #[error("{} cannot be opened: {}", .0.display(), .1)]
    Other(PathBuf, #[source] io::Error),
}

impl KernelHost {
    /// Opens `path`: `/dev/iommu`.
    ///
    /// # Errors
    /// [`OpenError`].
    pub fn open(path: &Path) -> std::result::Result<Self, OpenError> {
        let opened = File::options().read(true).write(true).open(path);
        let file = opened.map_err(|error| match error.kind() {
            io::ErrorKind::NotFound => OpenError::Absent(path.to_owned()),
            io::ErrorKind::PermissionDenied => OpenError::Permission(path.to_owned()),
            _ => OpenError::Other(path.to_owned(), error),
        })?;
        // Only an iommufd answers this way about object 0.
        let iommufd = IommuFd::new_from_fd(file);
        let asked = iommufd.destroy_iommu_object(0).map_err(errno_of);
        if asked != Err(Errno::ENOENT) {
            return Err(OpenError::NotIommufd(path.to_owned()));
        }
        Ok(Self { devices: Mutex::default(), iommufd, memory: Mutex::default() })
    }

    /// The VFIO file of a bound device, for its regions and interrupts. While anybody holds it, the
    /// device cannot be unbound.
    ///
    /// # Errors
    /// `ENOENT` no such device.
    pub fn device_file(&self, dev: ObjectId) -> Result<Arc<File>> {
        self.device(Verb::DeviceBind, dev, |device| device.file.clone())
    }

    fn devices(&self) -> MutexGuard<'_, BTreeMap<ObjectId, Device>> {
        self.devices.lock()
    }

    fn memory(&self) -> MutexGuard<'_, MappedMemory> {
        self.memory.lock()
    }

    /// Applies `get` to the device `dev`.
    fn device<T>(&self, verb: Verb, dev: ObjectId, get: impl Fn(&mut Device) -> T) -> Result<T> {
        let mut devices = self.devices();
        let device = devices.get_mut(&dev);
        device.map(get).ok_or_else(|| HostError::new(verb, dev, Errno::ENOENT, "no such device"))
    }

    /// The name of `dev` for messages, and its IOMMU's information.
    fn named(&self, dev: ObjectId) -> Option<(String, HwInfo)> {
        let devices = self.devices();
        let device = devices.get(&dev)?;
        Some((device.name.clone(), device.info))
    }
}

/// Detaches everything from a device. Its driver can only refuse that for what it does not know,
/// which is not attached.
fn detach_all(file: &File, attached: &BTreeSet<Option<u32>>) {
    // PASIDs first: None is the smallest.
    for pasid in attached.iter().rev() {
        if let Err(errno) = file.detach_iommufd_pt(*pasid) {
            log::error!("a device could not be detached: {errno}");
        }
    }
}

impl Drop for KernelHost {
    fn drop(&mut self) {
        let devices = std::mem::take(&mut *self.devices());
        for device in devices.values() {
            detach_all(&device.file, &device.attached);
        }
    }
}

impl fmt::Debug for KernelHost {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("KernelHost").field("devices", &*self.devices()).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_host_that_is_none_says_what_to_do() {
        let words = |path: &str| KernelHost::open(Path::new(path)).unwrap_err().to_string();
        let absent = words("/dev/no-such-iommu");
        assert!(absent.contains("there is no /dev/no-such-iommu") && absent.contains("modprobe"));
        assert_eq!(words("/dev/null"), "/dev/null is no iommufd");
    }
}
