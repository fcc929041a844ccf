// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What the kernel reports about a block device. Source: Linux `include/uapi/linux/fs.h`, and
//! `Documentation/ABI/stable/sysfs-block`.
#![allow(unsafe_code)]

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::MetadataExt;

/// Queries whether a block device is read-only; `_IO(0x12, 94)`.
const BLKROGET: libc::c_ulong = 0x125e;

/// Whether the block device `file` is read-only; the kernel lets it be opened for writing all the
/// same.
///
/// # Errors
/// The system's error.
pub(super) fn is_read_only(file: &File) -> io::Result<bool> {
    Ok(ask(file, BLKROGET)? != 0)
}

/// Sector size of the block device `file`, in bytes: the granularity of direct I/O.
///
/// # Errors
/// The system's error.
pub(super) fn sector_size(file: &File) -> io::Result<u32> {
    // Never negative.
    Ok(ask(file, libc::BLKSSZGET as libc::c_ulong)? as u32)
}

/// A file that is the same for all device nodes of the block device `file`: each node has its own
/// locks.
///
/// # Errors
/// The system's error, for example when there is no sysfs.
pub(super) fn common_file(file: &File) -> io::Result<File> {
    let device = file.metadata()?.rdev();
    let (major, minor) = (libc::major(device), libc::minor(device));
    File::open(format!("/sys/dev/block/{major}:{minor}/dev"))
}

/// Issues a request that returns an `int`.
fn ask(file: &File, request: libc::c_ulong) -> io::Result<libc::c_int> {
    let mut answer: libc::c_int = 0;
    // SAFETY: the descriptor is open while `file` is borrowed, and both requests that are used here
    // write one `int`, which lives until the call returns.
    match unsafe { libc::ioctl(file.as_raw_fd(), request as _, &mut answer) } {
        -1 => Err(io::Error::last_os_error()),
        _ => Ok(answer),
    }
}

#[cfg(test)]
mod tests {
    use std::fs::{File, OpenOptions};
    use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
    use std::path::{Path, PathBuf};
    use std::process::Command;

    use super::super::disk::reopen;
    use super::super::{Disk, DiskAccess, DiskError};

    /// A loop device over a file of 1 MiB.
    struct Loop {
        path: PathBuf,
        directory: tempfile::TempDir,
    }

    impl Loop {
        fn new(options: &[&str]) -> Option<Self> {
            let directory = tempfile::tempdir().unwrap();
            let image = directory.path().join("image");
            File::create(&image).unwrap().set_len(1 << 20).unwrap();
            let made =
                Command::new("losetup").args(["--show", "-f"]).args(options).arg(&image).output();
            match made {
                Ok(made) if made.status.success() => {
                    let path = String::from_utf8(made.stdout).unwrap();
                    Some(Self { path: path.trim().into(), directory })
                }
                made => {
                    eprintln!("no loop device is had: NOT tested: {made:?}");
                    None
                }
            }
        }

        /// Another device node for it.
        fn node(&self, name: &str) -> PathBuf {
            let device = std::fs::metadata(&self.path).unwrap().rdev();
            let (major, minor) = (libc::major(device), libc::minor(device));
            let node = self.directory.path().join(name);
            let made = Command::new("mknod")
                .arg(&node)
                .args(["b", &major.to_string(), &minor.to_string()])
                .status();
            assert!(made.unwrap().success());
            node
        }
    }

    impl Drop for Loop {
        fn drop(&mut self) {
            let detached = Command::new("losetup").arg("-d").arg(&self.path).status();
            assert!(detached.unwrap().success());
        }
    }

    fn access(read_only: bool) -> DiskAccess {
        DiskAccess { read_only, ..DiskAccess::default() }
    }

    fn open(path: &Path, read_only: bool) -> Result<Disk, DiskError> {
        Disk::open(path, access(read_only))
    }

    #[test]
    fn what_the_kernel_lets_nobody_write_is_no_disk_to_write() {
        let Some(device) = Loop::new(&["--read-only"]) else { return };
        let error = open(&device.path, false).unwrap_err();
        assert!(matches!(error, DiskError::ReadOnlyDevice(_)), "{error}");
        assert!(error.to_string().contains("readonly=on"), "{error}");
        assert!(open(&device.path, true).unwrap().is_read_only());
    }

    #[test]
    fn blocks_are_the_device_s_sectors_without_the_page_cache() {
        for (sector, size) in [("512", 512), ("4096", 4096)] {
            let Some(device) = Loop::new(&["--sector-size", sector]) else { return };
            let disk =
                Disk::open(&device.path, DiskAccess { direct: true, ..DiskAccess::default() })
                    .unwrap();
            assert_eq!((disk.block_size(), disk.size()), (size, 1 << 20));
            drop(disk);
            assert_eq!(reopen(&device.path, access(false)).unwrap().block_size(), 512);
        }
    }

    #[test]
    fn all_nodes_of_a_device_are_one_disk() {
        let Some(device) = Loop::new(&[]) else { return };
        let (one, other) = (device.node("one"), device.node("other"));
        for (first, second, may) in
            [(true, true, true), (true, false, false), (false, true, false), (false, false, false)]
        {
            let _first = reopen(&one, access(first)).unwrap();
            match open(&other, second) {
                Ok(_) => assert!(may, "readonly {first}, then {second}"),
                Err(DiskError::InUse(_) | DiskError::Claimed(_)) => {
                    assert!(!may, "readonly {first}, then {second}");
                }
                Err(error) => panic!("{error}"),
            }
        }
    }

    #[test]
    fn what_the_kernel_gave_to_somebody_is_not_written() {
        let Some(device) = Loop::new(&[]) else { return };
        // As a mount does.
        let claim = OpenOptions::new().read(true).custom_flags(libc::O_EXCL).open(&device.path);
        let error = open(&device.path, false).unwrap_err();
        assert!(matches!(error, DiskError::Claimed(_)), "{error}");
        assert!(open(&device.path, true).is_ok());
        drop(claim);
        let _disk = reopen(&device.path, access(false)).unwrap();
        let claim = OpenOptions::new().read(true).custom_flags(libc::O_EXCL).open(&device.path);
        assert_eq!(claim.unwrap_err().raw_os_error(), Some(libc::EBUSY));
    }
}
