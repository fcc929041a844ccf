// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What sysfs says of a device before anybody opens it: enough to tell a user what is missing.
#![forbid(unsafe_code)]

use std::fs;
use std::path::Path;

use super::error::VfioProblem;

/// The driver that a device is for, and one that keeps no device from being assigned.
const VFIO: &str = "vfio-pci";

/// Checks whether the device whose directory is `path` (`/sys/bus/pci/devices/0000:01:00.0`) can be
/// had through VFIO, as far as sysfs tells.
///
/// # Errors
/// What is in the way.
pub fn check(path: &Path) -> Result<(), VfioProblem> {
    let text = path.display().to_string();
    if !path.is_dir() {
        return Err(VfioProblem::NoDevice);
    }
    match driver(path) {
        Some(driver) if is_vfio(&driver) => {}
        driver => {
            let path = text;
            return Err(VfioProblem::NotVfio { driver, address: address(&path), path });
        }
    }
    if !path.join("vfio-dev").is_dir() {
        return Err(VfioProblem::NoCdev { path: text });
    }
    let others = hosts_of_group(path);
    if !others.is_empty() {
        return Err(VfioProblem::Group { others: others.join(", ") });
    }
    Ok(())
}

/// The variants of vfio-pci for certain devices have its name in theirs.
fn is_vfio(driver: &str) -> bool {
    driver == VFIO || driver.replace('_', "-").ends_with(VFIO)
}

fn driver(device: &Path) -> Option<String> {
    let driver = fs::read_link(device.join("driver")).ok()?;
    Some(driver.file_name()?.to_string_lossy().into_owned())
}

fn address(path: &str) -> String {
    path.trim_end_matches('/').rsplit('/').next().unwrap_or(path).to_owned()
}

/// Those devices of the group of `device` that a driver of the host's has. Bridges may keep theirs,
/// as no bridge does DMA of its own.
fn hosts_of_group(device: &Path) -> Vec<String> {
    let Ok(group) = fs::read_dir(device.join("iommu_group/devices")) else { return Vec::new() };
    let mut others: Vec<_> = group
        .filter_map(|entry| {
            let path = entry.ok()?.path();
            let driver = driver(&path)?;
            let host = !is_vfio(&driver) && driver != "pcieport" && driver != "pci-stub";
            host.then(|| format!("{} ({driver})", address(&path.display().to_string())))
        })
        .collect();
    others.sort();
    others
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;
    use std::path::PathBuf;

    use super::*;

    struct Sysfs(tempfile::TempDir);

    impl Sysfs {
        fn new() -> Self {
            Self(tempfile::tempdir().unwrap())
        }

        fn device(&self, address: &str, driver: Option<&str>) -> PathBuf {
            let path = self.0.path().join("devices").join(address);
            fs::create_dir_all(&path).unwrap();
            if let Some(driver) = driver {
                symlink(self.0.path().join("drivers").join(driver), path.join("driver")).unwrap();
            }
            path
        }

        fn group(&self, devices: &[&PathBuf]) {
            let group = self.0.path().join("groups/7");
            fs::create_dir_all(group.join("devices")).unwrap();
            for device in devices {
                let name = device.file_name().unwrap();
                symlink(device, group.join("devices").join(name)).unwrap();
                symlink(&group, device.join("iommu_group")).unwrap();
            }
        }
    }

    fn problem(path: &Path) -> String {
        check(path).unwrap_err().to_string()
    }

    #[test]
    fn a_device_of_vfio_alone_in_its_group_is_fine() {
        let sysfs = Sysfs::new();
        let device = sysfs.device("0000:01:00.0", Some("vfio-pci"));
        assert!(problem(&device).contains("CONFIG_VFIO_DEVICE_CDEV"));
        fs::create_dir_all(device.join("vfio-dev/vfio0")).unwrap();
        check(&device).unwrap();
        let bridge = sysfs.device("0000:00:01.0", Some("pcieport"));
        sysfs.group(&[&device, &bridge]);
        check(&device).unwrap();
    }

    #[test]
    fn what_is_missing_is_told_with_what_to_do() {
        let sysfs = Sysfs::new();
        let there = "ls /sys/bus/pci/devices";
        assert!(problem(&sysfs.0.path().join("devices/0000:09:00.0")).contains(there));
        let hosts = problem(&sysfs.device("0000:02:00.0", Some("nvme")));
        assert!(
            hosts.starts_with("the host's driver 'nvme' has it; give it to vfio-pci"),
            "{hosts}"
        );
        assert!(
            hosts.contains("driver/unbind") && hosts.contains("echo 0000:02:00.0 >"),
            "{hosts}"
        );
        let nobodys = problem(&sysfs.device("0000:03:00.0", None));
        assert!(
            nobodys.starts_with("no driver has it") && !nobodys.contains("unbind"),
            "{nobodys}"
        );
    }

    #[test]
    fn a_group_is_assigned_as_a_whole() {
        let sysfs = Sysfs::new();
        let device = sysfs.device("0000:01:00.0", Some("mlx5_vfio_pci"));
        fs::create_dir_all(device.join("vfio-dev/vfio0")).unwrap();
        let other = sysfs.device("0000:01:00.1", Some("snd_hda_intel"));
        sysfs.group(&[&device, &other]);
        assert!(
            problem(&device).contains("0000:01:00.1 (snd_hda_intel) of the same IOMMU group is")
        );
    }
}
