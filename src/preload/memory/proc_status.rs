// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! `/proc/PID/status` with what emulated iommufds have pinned and locked: `VmPin` and `VmLck`,
//! added up like in a kernel.

use std::ffi::CString;
use std::os::fd::OwnedFd;

use crate::memory::accounts::Pinned;
use crate::state::State;
use crate::{callers::calls, sys};

/// The process whose status `path` is.
pub fn process_of(path: &[u8]) -> Option<i32> {
    let path = std::str::from_utf8(path).ok()?;
    let pid = path.strip_prefix("/proc/")?.strip_suffix("/status")?;
    if pid == "self" {
        return Some(sys::process_id());
    }
    pid.parse().ok().filter(|pid: &i32| *pid > 0 && pid.to_string().len() == path.len() - 13)
}

/// The status of process `pid` as a new file; none if nothing is to be added, or it cannot be read.
pub fn open(state: &State, pid: i32) -> Option<OwnedFd> {
    let pinned = calls::pinned(state, pid);
    if pinned == Pinned::default() {
        return None;
    }
    let path = CString::new(format!("/proc/{pid}/status")).ok()?;
    let status = sys::read_to_string(&path).ok()?;
    sys::file_of(with(&status, pinned).as_bytes()).ok()
}

/// `status` with `pinned` added.
fn with(status: &str, pinned: Pinned) -> String {
    let mut result = String::with_capacity(status.len() + 16);
    for line in status.lines() {
        let more = [("VmPin:", pinned.pinned), ("VmLck:", pinned.locked)];
        let added = more.iter().find_map(|(name, bytes)| {
            let number = line.strip_prefix(name)?.trim().strip_suffix(" kB")?;
            let kilobytes = number.trim().parse::<u64>().ok()? + bytes / 1024;
            Some(format!("{name}\t{kilobytes:8} kB"))
        });
        result.push_str(added.as_deref().unwrap_or(line));
        result.push('\n');
    }
    result
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths() {
        assert_eq!(process_of(b"/proc/123/status"), Some(123));
        assert_eq!(process_of(b"/proc/self/status"), Some(sys::process_id()));
        for other in ["/proc/0123/status", "/proc/-1/status", "/proc/1/stat", "/proc/x/status"] {
            assert_eq!(process_of(other.as_bytes()), None, "{other}");
        }
    }

    #[test]
    fn two_lines_are_others() {
        let status = "Name:\tcat\nVmLck:\t       4 kB\nVmPin:\t       0 kB\nVmHWM:\t    2208 kB\n";
        let pinned = Pinned { pinned: 0x3000, locked: 0x1000 };
        let wanted = "Name:\tcat\nVmLck:\t       8 kB\nVmPin:\t      12 kB\nVmHWM:\t    2208 kB\n";
        assert_eq!(with(status, pinned), wanted);
    }
}
