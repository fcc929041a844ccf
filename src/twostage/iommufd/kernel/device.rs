// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! VFIO character devices: finding one, and bound ones.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::iommufd::{Errno, HwInfo};

/// Linux's folder of VFIO character devices.
const CDEVS: &str = "/dev/vfio/devices";

/// A device that is bound to an iommufd. Closing its file unbinds it.
#[derive(Debug)]
pub(super) struct Device {
    /// The name it was bound by.
    pub name: String,
    pub cdev: PathBuf,
    pub file: Arc<File>,
    pub info: HwInfo,
    /// Attachments: of the device, and of PASIDs.
    pub attached: BTreeSet<Option<u32>>,
}

/// Why there is no such VFIO device: the errno, and what to do.
pub(super) type Refusal = (Errno, String);

/// The VFIO character device for `name`: its path, or a device in sysfs
/// (`/sys/bus/pci/devices/0000:01:00.0`) that is bound to vfio-pci.
pub(super) fn cdev_of(name: &str) -> Result<PathBuf, Refusal> {
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
pub(super) fn open_cdev(cdev: &Path) -> Result<File, Refusal> {
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

#[cfg(test)]
mod tests {
    use super::*;
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
}
