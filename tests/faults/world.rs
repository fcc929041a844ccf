// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A world of a test's own: what it mounts, and its network interfaces, vanish with its thread. And
//! where files are on a disk.

use std::env::temp_dir;
use std::path::Path;

use rustix::fs::statfs;
use rustix::mount::{mount_change, MountPropagationFlags};
use rustix::thread::UnshareFlags;
use tempfile::TempDir;
use twostage::skips::not_tested;

/// From now on this thread, and what it starts, has mounts and interfaces of its own. Returns
/// whether that is possible, which is said if not.
pub fn alone() -> bool {
    // Unsafe with descriptors alone, which are not unshared.
    #[allow(deprecated)]
    let alone =
        rustix::thread::unshare(UnshareFlags::NEWNS | UnshareFlags::NEWNET).and_then(|()| {
            let private = MountPropagationFlags::PRIVATE | MountPropagationFlags::REC;
            mount_change("/", private)
        });
    if let Err(error) = alone {
        not_tested(format!("no namespaces are to be had ({error}; is this root?)"));
    }
    alone.is_ok()
}

/// Where files are in memory, which is not waited for.
pub const IN_MEMORY: &str = "/dev/shm";
/// `TMPFS_MAGIC` of Linux's `include/uapi/linux/magic.h`.
const TMPFS: u64 = 0x0102_1994;

/// Folders for disks of each kind: in memory, and served by io_uring or threads; what there is no
/// folder for is said.
pub fn folders() -> Vec<TempDir> {
    [Some(TempDir::new_in(IN_MEMORY).unwrap()), on_a_disk()].into_iter().flatten().collect()
}

/// A folder on a disk: that of temporary files may be in memory.
pub fn on_a_disk() -> Option<TempDir> {
    let is = |folder: &&Path| statfs(*folder).is_ok_and(|system| system.f_type as u64 != TMPFS);
    let temporary = temp_dir();
    let candidates =
        [temporary.as_path(), Path::new(env!("CARGO_TARGET_TMPDIR")), Path::new("/var/tmp")];
    let folder = candidates.into_iter().find(is);
    if folder.is_none() {
        not_tested("all folders are in memory, disks that io_uring serves");
    }
    folder.map(|folder| TempDir::new_in(folder).unwrap())
}
