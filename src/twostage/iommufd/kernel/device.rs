// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! VFIO character devices: finding one, binding it, and bound ones.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File};
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::ioctls::VfioCdev;
use super::{detach_all, meaning, KernelHost};
use crate::iommufd::{Errno, HostError, HwInfo, ObjectId, Result, Verb};

/// Linux's folder of VFIO character devices.
const CDEVS: &str = "/dev/vfio/devices";

/// A device that is bound to an iommufd. Closing its file unbinds it.
#[derive(Debug)]
pub(super) struct Device {
    /// The name it was bound by.
    pub name: String,
    /// The number of its character device, which is the same by any path and any descriptor.
    pub number: u64,
    pub file: Arc<File>,
    pub info: HwInfo,
    /// Attachments: of the device, and of PASIDs.
    pub attached: BTreeSet<Option<u32>>,
}

impl Device {
    /// Nothing is attached.
    fn new(name: &str, number: u64, file: File, info: HwInfo) -> Self {
        Self {
            name: name.to_owned(),
            number,
            file: Arc::new(file),
            info,
            attached: BTreeSet::new(),
        }
    }
}

/// Why there is no such VFIO device: the errno, and what to do.
type Refusal = (Errno, String);

/// The VFIO character device for `name`: its path, or a device in sysfs
/// (`/sys/bus/pci/devices/0000:01:00.0`) that is bound to vfio-pci.
fn cdev_of(name: &str) -> Result<PathBuf, Refusal> {
    let path = Path::new(name);
    if path.starts_with("/dev") {
        return Ok(path.to_owned());
    }
    if !path.is_dir() {
        return Err((
            Errno::ENODEV,
            format!(
                "there is no device {name}; a VFIO device is named by its path in {CDEVS} or in \
                 /sys/bus/pci/devices"
            ),
        ));
    }
    let entries = fs::read_dir(path.join("vfio-dev")).into_iter().flatten().flatten();
    match entries.into_iter().next() {
        Some(entry) => Ok(Path::new(CDEVS).join(entry.file_name())),
        None => Err((Errno::ENODEV, not_vfio(path))),
    }
}

/// Why the device at `path` in sysfs has no VFIO character device.
fn not_vfio(path: &Path) -> String {
    let driver = fs::read_link(path.join("driver")).ok();
    let driver = driver.as_ref().and_then(|link| link.file_name()?.to_str());
    let shown = path.display();
    let bound = match driver {
        Some("vfio-pci") => {
            return format!(
                "{shown} is bound to vfio-pci but has no character device: the kernel needs \
                 CONFIG_VFIO_DEVICE_CDEV"
            )
        }
        Some(driver) => format!("bound to {driver}"),
        None => "bound to no driver".to_owned(),
    };
    let address = path.file_name().unwrap_or_default().to_string_lossy();
    let unbind =
        driver.map_or(String::new(), |_| format!("echo {address} > {shown}/driver/unbind; "));
    format!(
        "{shown} is {bound}, not to vfio-pci: modprobe vfio-pci; echo vfio-pci > \
         {shown}/driver_override; {unbind}echo {address} > /sys/bus/pci/drivers_probe"
    )
}

/// Opens the character device.
fn open_cdev(cdev: &Path) -> Result<File, Refusal> {
    let shown = cdev.display();
    File::options().read(true).write(true).open(cdev).map_err(|error| match error.kind() {
        io::ErrorKind::NotFound => (
            Errno::ENODEV,
            format!(
                "there is no {shown}: bind the device to vfio-pci, in a kernel with \
                 CONFIG_VFIO_DEVICE_CDEV"
            ),
        ),
        io::ErrorKind::PermissionDenied => (
            Errno::EACCES,
            format!("{shown} may not be opened: its owner or its mode does not allow it"),
        ),
        _ => {
            let errno = error.raw_os_error().map_or(Errno::EIO, Errno::from_raw);
            (errno, format!("{shown} cannot be opened: {error}"))
        }
    })
}

/// The number of the character device `file`, if none of `devices` has it: a device that is passed
/// to a VMM that bound it by its path is the same device.
fn number_if_free(
    devices: &BTreeMap<ObjectId, Device>,
    file: &File,
    name: &str,
) -> Result<u64, Refusal> {
    let status = file.metadata().ok().filter(|status| status.file_type().is_char_device());
    let Some(status) = status else {
        let fd = file.as_raw_fd();
        let text = format!("{name}: descriptor {fd} is no character device of those in {CDEVS}");
        return Err((Errno::EINVAL, text));
    };
    let number = status.rdev();
    match devices.values().find(|device| device.number == number) {
        Some(other) if other.name == name => {
            Err((Errno::EBUSY, format!("{name} is bound here already")))
        }
        Some(other) => {
            Err((Errno::EBUSY, format!("{name} is bound here already, as {}", other.name)))
        }
        None => Ok(number),
    }
}

fn refused((errno, detail): Refusal) -> HostError {
    HostError::new(Verb::DeviceBind, None, errno, detail)
}

impl KernelHost {
    /// Binds the device `name`.
    pub(super) fn bind_name(&self, name: &str) -> Result<ObjectId> {
        let cdev = cdev_of(name).map_err(refused)?;
        self.bind(open_cdev(&cdev).map_err(refused)?, name)
    }

    /// Binds the VFIO character device `cdev`, which somebody else opened and nobody bound, as
    /// passed over a socket. `name` is for messages.
    ///
    /// ```
    /// use std::os::fd::OwnedFd;
    /// use twostage::iommufd::{HostIommu, KernelHost, ObjectId, Result};
    ///
    /// fn bind_received(host: &KernelHost, cdev: OwnedFd) -> Result<ObjectId> {
    ///     let dev = host.bind_fd(cdev, "the network card")?;
    ///     println!("{:?}", host.get_hw_info(dev)?);
    ///     Ok(dev)
    /// }
    /// ```
    ///
    /// # Errors
    /// Those of [`device_bind`](crate::iommufd::HostIommu::device_bind); `EINVAL` not such a
    /// device, or bound already: [`KernelHost::adopt`] it. The descriptor is closed then.
    pub fn bind_fd(&self, cdev: OwnedFd, name: &str) -> Result<ObjectId> {
        self.bind(cdev.into(), name)
    }

    fn bind(&self, file: File, name: &str) -> Result<ObjectId> {
        let mut devices = self.devices();
        let number = number_if_free(&devices, &file, name).map_err(refused)?;
        let dev = file.bind_iommufd(self.iommufd()).map_err(|errno| {
            refused((errno, format!("{name}: {}", meaning::of(Verb::DeviceBind, errno))))
        })?;
        let dev = ObjectId(dev);
        // If this fails, closing the file unbinds it.
        let info =
            self.hw_info(dev.0).map_err(|errno| meaning::error(Verb::GetHwInfo, dev, errno))?;
        devices.insert(dev, Device::new(name, number, file, info));
        Ok(dev)
    }

    /// Takes over a device that somebody else bound to this iommufd: `file` is a duplicate of its
    /// descriptor, `dev` the `out_devid` of its `VFIO_DEVICE_BIND_IOMMUFD`. `name` is for messages.
    ///
    /// The device is detached, so its DMA is blocked until it is attached here. Its PASIDs cannot
    /// be listed: whoever attached some detaches them first. From then on only this host attaches
    /// it. Unbinding it here, or dropping the host, detaches it and closes `file`; it stays bound
    /// until the owner's descriptor is closed, too.
    ///
    /// The kernel does not tell which iommufd a device is bound to: that it is this one, and that
    /// `dev` is this device, is up to the caller.
    ///
    /// ```
    /// use std::os::fd::AsFd;
    /// use twostage::iommufd::{HostError, HostIommu, KernelHost, ObjectId};
    ///
    /// /// `device` is bound to the iommufd of `host`, as `devid`.
    /// fn take_over(
    ///     host: &KernelHost,
    ///     device: impl AsFd,
    ///     devid: u32,
    ///     ioas: ObjectId,
    /// ) -> Result<(), Box<dyn std::error::Error>> {
    ///     let file = device.as_fd().try_clone_to_owned()?;
    ///     let dev = host.adopt(file, ObjectId(devid), "0000:01:00.0")?;
    ///     host.device_attach(dev, None, ioas)?;
    ///     Ok(())
    /// }
    /// ```
    ///
    /// # Errors
    /// `EBUSY` it is bound here already; `ENOENT` the iommufd has no device `dev`; `EINVAL` not a
    /// VFIO character device, or not bound: [`KernelHost::bind_fd`] it. The descriptor is closed
    /// then.
    pub fn adopt(&self, file: OwnedFd, dev: ObjectId, name: &str) -> Result<ObjectId> {
        let file = File::from(file);
        let mut devices = self.devices();
        let number = number_if_free(&devices, &file, name).map_err(refused)?;
        if let Some(other) = devices.get(&dev) {
            let text = format!("{name} cannot be device {dev}, which is {} here", other.name);
            return Err(HostError::new(Verb::DeviceBind, dev, Errno::EBUSY, text));
        }
        let explained = |verb, errno, known, text: &str| {
            let meaning = if errno == known { text.into() } else { meaning::of(verb, errno) };
            HostError::new(verb, dev, errno, format!("{name}: {meaning}"))
        };
        let info = self.hw_info(dev.0).map_err(|errno| {
            let text = "this iommufd has no such device; pass what binding it returned (out_devid)";
            explained(Verb::GetHwInfo, errno, Errno::ENOENT, text)
        })?;
        // Does nothing if nothing is attached.
        file.detach_iommufd_pt(None).map_err(|errno| {
            let text = "it is not bound; bind_fd binds it";
            explained(Verb::DeviceDetach, errno, Errno::EINVAL, text)
        })?;
        devices.insert(dev, Device::new(name, number, file, info));
        Ok(dev)
    }

    /// As [`KernelHost::adopt`], of a device that [`VfioDevice`](vfio_ioctls::VfioDevice) bound to
    /// this host's [iommufd](KernelHost::iommufd). It keeps its regions and interrupts.
    ///
    /// Dropping `device` detaches it here, too, and panics if the kernel refuses that: detach it
    /// here before.
    ///
    /// ```
    /// use std::path::Path;
    /// use std::sync::Arc;
    /// use twostage::iommufd::{HostIommu, KernelHost};
    /// use vfio_ioctls::{VfioDevice, VfioIommufd};
    ///
    /// /// Binds a device that is in sysfs at `path`, and lets `host` decide what it reaches.
    /// fn bind(host: &KernelHost, path: &str) -> Result<VfioDevice, Box<dyn std::error::Error>> {
    ///     let iommufd = Arc::new(VfioIommufd::new(host.iommufd().clone(), None, None)?);
    ///     let device = VfioDevice::new(Path::new(path), iommufd, false)?;
    ///     let dev = host.adopt_vfio(&device, path)?;
    ///     println!("{:?}", host.get_hw_info(dev)?);
    ///     Ok(device)
    /// }
    /// ```
    ///
    /// # Errors
    /// Those of [`KernelHost::adopt`]; `EINVAL` `device` did not bind it itself (it has no
    /// `iommufd_dev_id`): who did knows the id for [`KernelHost::adopt`]; `EMFILE` no descriptor is
    /// free.
    #[cfg(feature = "vfio-ioctls")]
    pub fn adopt_vfio(&self, device: &vfio_ioctls::VfioDevice, name: &str) -> Result<ObjectId> {
        let Some(dev) = device.iommufd_dev_id() else {
            let text = "it was bound before this VfioDevice; adopt takes the id that binding gave";
            return Err(refused((Errno::EINVAL, format!("{name}: {text}"))));
        };
        let file = super::ioctls::duplicate(device).map_err(|errno| {
            refused((errno, format!("{name}: its descriptor cannot be duplicated")))
        })?;
        self.adopt(file, ObjectId(dev), name)
    }

    /// Detaches the device `dev`, and returns its file: this host is done with it. It stays bound
    /// until the file and its duplicates are closed.
    ///
    /// ```
    /// use std::os::fd::OwnedFd;
    /// use twostage::iommufd::{KernelHost, ObjectId, Result};
    ///
    /// fn give_back(host: &KernelHost, dev: ObjectId) -> Result<OwnedFd> {
    ///     host.release(dev)
    /// }
    /// ```
    ///
    /// # Errors
    /// `ENOENT` no such device; `EBUSY` somebody holds what [`KernelHost::device_file`] returned.
    pub fn release(&self, dev: ObjectId) -> Result<OwnedFd> {
        let mut devices = self.devices();
        let Some(device) = devices.remove(&dev) else {
            return Err(HostError::new(Verb::DeviceUnbind, dev, Errno::ENOENT, "no such device"));
        };
        match Arc::try_unwrap(device.file) {
            Ok(file) => {
                // Nothing may stay attached if others have a copy of the descriptor.
                detach_all(&file, &device.attached);
                Ok(file.into())
            }
            Err(file) => {
                devices.insert(dev, Device { file, ..device });
                let detail = "its regions or interrupts are in use";
                Err(HostError::new(Verb::DeviceUnbind, dev, Errno::EBUSY, detail))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use iommufd_ioctls::IommuFd;
    use std::os::unix::fs::symlink;

    fn device() -> (tempfile::TempDir, String) {
        let folder = tempfile::tempdir().unwrap();
        let name = folder.path().join("0000:01:00.0");
        fs::create_dir(&name).unwrap();
        (folder, name.to_str().unwrap().to_owned())
    }

    #[test]
    fn a_device_is_found_by_its_own_path_or_by_that_of_sysfs() {
        let (_folder, name) = device();
        fs::create_dir_all(Path::new(&name).join("vfio-dev/vfio7")).unwrap();
        let cdev = Path::new("/dev/vfio/devices/vfio7");
        assert_eq!(cdev_of(&name).unwrap(), cdev);
        assert_eq!(cdev_of("/dev/vfio/devices/vfio7").unwrap(), cdev);
    }

    #[test]
    fn who_is_bound_elsewhere_is_told_what_to_do() {
        let (_folder, name) = device();
        let words = |name: &str| {
            let (errno, words) = cdev_of(name).unwrap_err();
            assert_eq!(errno, Errno::ENODEV);
            assert!(!words.contains('\n'));
            words
        };
        assert!(words(&name).contains("bound to no driver, not to vfio-pci"));
        let driver = Path::new(&name).join("driver");
        symlink("/sys/bus/pci/drivers/nvme", &driver).unwrap();
        let text = words(&name);
        assert!(text.contains("is bound to nvme, not to vfio-pci"), "{text}");
        assert!(text.contains("echo 0000:01:00.0 > /sys/bus/pci/drivers_probe"), "{text}");
        fs::remove_file(&driver).unwrap();
        symlink("/sys/bus/pci/drivers/vfio-pci", &driver).unwrap();
        assert!(words(&name).contains("CONFIG_VFIO_DEVICE_CDEV"));
        assert!(words("/sys/bus/pci/devices/none").contains("there is no device"));
        let missing = open_cdev(Path::new("/dev/vfio/devices/none")).unwrap_err();
        assert!(missing.0 == Errno::ENODEV && missing.1.contains("bind the device to vfio-pci"));
    }

    #[test]
    fn a_descriptor_of_no_device_is_named() {
        // No ioctl of this host would succeed.
        let null = || File::options().read(true).write(true).open("/dev/null").unwrap();
        let host = KernelHost::unchecked(Arc::new(IommuFd::new_from_fd(null())));
        let words = |error: HostError, errno| {
            assert_eq!(error.errno, errno);
            error.to_string()
        };
        let file = || OwnedFd::from(tempfile::tempfile().unwrap());
        let text = words(host.bind_fd(file(), "nic").unwrap_err(), Errno::EINVAL);
        assert!(text.contains("nic: descriptor ") && text.contains("is no character"), "{text}");
        let text = words(host.adopt(file(), ObjectId(3), "nic").unwrap_err(), Errno::EINVAL);
        assert!(text.contains("is no character device of those in /dev/vfio/devices"), "{text}");
        // A character device, but not VFIO's.
        let text = words(host.bind_fd(null().into(), "nic").unwrap_err(), Errno::ENOTTY);
        assert!(text.contains("nic: "), "{text}");
        let text = words(host.adopt(null().into(), ObjectId(3), "nic").unwrap_err(), Errno::ENOTTY);
        assert!(text.contains("nic: "), "{text}");
        assert!(host.devices().is_empty());
    }

    #[test]
    fn a_device_is_known_by_its_number() {
        let null = || File::options().read(true).open("/dev/null").unwrap();
        let info = HwInfo {
            data: crate::iommufd::HwInfoData::None,
            capabilities: crate::iommufd::HwCapabilities::new(),
            max_pasid_log2: 0,
        };
        let mut devices = BTreeMap::new();
        let number = number_if_free(&devices, &null(), "nic").unwrap();
        devices.insert(ObjectId(1), Device::new("nic", number, null(), info));
        let zero = File::open("/dev/zero").unwrap();
        assert_ne!(number_if_free(&devices, &zero, "disk").unwrap(), number);
        let text = |name| number_if_free(&devices, &null(), name).unwrap_err();
        assert_eq!(text("nic"), (Errno::EBUSY, "nic is bound here already".to_owned()));
        assert_eq!(text("7").1, "7 is bound here already, as nic");
    }
}
