// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The host's MSI window of an assigned device, which the guest's stage 1 must map 1:1.
//!
//! On arm64 Linux reserves a window of IOVAs for MSIs and reports it in sysfs
//! (`Documentation/ABI/testing/sysfs-kernel-iommu_groups`, `reserved_regions`). It is a constant of
//! its SMMU driver ([`MSI_WINDOW`]), but not guaranteed.

use std::fs;
use std::ops::RangeInclusive;
use std::path::{Path, PathBuf};

use super::doorbell::MSI_WINDOW;
use super::error::{VfioError, VfioProblem};

/// The MSI window of the device at `path`, in bytes; `name` is for errors. Linux's default window
/// if the host does not report one. `memory` is the guest's, which stage 2 maps at the same
/// addresses: (first address, length).
///
/// # Errors
/// The guest has memory there.
pub fn message_window(
    name: &str,
    path: &Path,
    memory: impl IntoIterator<Item = (u64, u64)>,
) -> Result<RangeInclusive<u64>, VfioError> {
    let regions = fs::read_to_string(sysfs(path).join("iommu_group/reserved_regions"));
    let window = regions.as_deref().ok().and_then(window).unwrap_or(MSI_WINDOW);
    let overlaps = |(start, length): (u64, u64)| {
        length != 0 && start <= *window.end() && start.saturating_add(length - 1) >= *window.start()
    };
    if memory.into_iter().any(overlaps) {
        return Err(VfioError::new(name, VfioProblem::Messages(window)));
    }
    Ok(window)
}

/// The folder in sysfs of the device at `path`, which may be VFIO's character device.
fn sysfs(path: &Path) -> PathBuf {
    match path.strip_prefix("/dev/vfio/devices") {
        Ok(cdev) => Path::new("/sys/class/vfio-dev").join(cdev).join("device"),
        Err(_) => path.to_owned(),
    }
}

/// The MSI window in `regions`: a line each with first address, last address and type.
fn window(regions: &str) -> Option<RangeInclusive<u64>> {
    let address = |text: &str| u64::from_str_radix(text.strip_prefix("0x")?, 16).ok();
    let region = |line: &str| {
        let mut words = line.split_whitespace();
        let (first, last) = (address(words.next()?)?, address(words.next()?)?);
        (words.next() == Some("msi") && first <= last).then_some(first..=last)
    };
    regions.lines().find_map(region)
}

#[cfg(test)]
mod tests {
    use super::*;

    const RAM: (u64, u64) = (0x4000_0000, 0x1000_0000);

    #[test]
    fn the_window_is_what_the_host_tells_of() {
        let regions = "0x0000000000001000 0x0000000000001fff direct\n\
                       0x0000000008000000 0x00000000080fffff msi\n";
        assert_eq!(window(regions), Some(MSI_WINDOW));
        assert_eq!(window("0xa0000000 0xa00fffff msi"), Some(0xa000_0000..=0xa00f_ffff));
        for none in ["", "0x8000000 0x80fffff reserved", "0x2 0x1 msi", "8000000 80fffff msi", "x"]
        {
            assert_eq!(window(none), None, "{none}");
        }
    }

    #[test]
    fn a_character_device_is_found_in_sysfs() {
        let of = |path: &str| sysfs(Path::new(path)).display().to_string();
        assert_eq!(of("/dev/vfio/devices/vfio3"), "/sys/class/vfio-dev/vfio3/device");
        assert_eq!(of("/sys/bus/pci/devices/0000:00:02.0"), "/sys/bus/pci/devices/0000:00:02.0");
    }

    #[test]
    fn a_host_that_does_not_tell_has_the_usual_window() {
        let none = Path::new("/sys/bus/pci/devices/none");
        assert_eq!(message_window("none", none, [RAM]).unwrap(), MSI_WINDOW);
    }

    /// The window of a host that reports `regions`.
    fn told(regions: &str) -> Result<RangeInclusive<u64>, VfioError> {
        let folder = tempfile::tempdir().unwrap();
        fs::create_dir(folder.path().join("iommu_group")).unwrap();
        fs::write(folder.path().join("iommu_group/reserved_regions"), regions).unwrap();
        message_window("0000:00:02.0", folder.path(), [(0, 0), RAM])
    }

    #[test]
    fn a_window_elsewhere_is_taken_where_the_guest_has_no_memory() {
        let window = told("0x00000000a0000000 0x00000000a00fffff msi\n");
        assert_eq!(window.unwrap(), 0xa000_0000..=0xa00f_ffff);
        assert_eq!(
            told("0x0000000048000000 0x00000000480fffff msi\n").unwrap_err().to_string(),
            "--vfio 0000:00:02.0: the host directs its interrupt messages to \
             0x48000000..=0x480fffff, where the guest has memory: none would arrive; reduce \
             --memory so that it ends before, or leave the device out"
        );
        for beside in ["0x3ff00000 0x3fffffff msi", "0x50000000 0x500fffff msi"] {
            told(beside).unwrap();
        }
        for across in ["0x3ff00000 0x40000000 msi", "0x4fffffff 0x500fffff msi"] {
            told(across).unwrap_err();
        }
    }
}
