// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A world of a test's own: what it mounts, and its network interfaces, vanish with its thread.

use rustix::mount::{mount_change, MountPropagationFlags};
use rustix::thread::UnshareFlags;
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
