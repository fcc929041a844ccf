// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Linux's fault injection, as used by its selftests: `/proc/self/task/TID/fail-nth` of the thread
//! that opens it, whose n-th allocation in the emulated host then fails, and the switches in
//! debugfs that allow all allocations to fail, which is always the case here.

use twostage::iommufd::Errno;
use twostage_emulated::selftest::{fail_nth, set_fail_nth};

use crate::files::file::{Answer, Call, Caller, File};
use crate::sys;

/// The switches' paths in `/sys/kernel/debug`.
const SWITCHES: [&[u8]; 3] = [
    b"failslab/ignore-gfp-wait",
    b"fail_page_alloc/ignore-gfp-wait",
    b"fail_page_alloc/ignore-gfp-highmem",
];

/// Whether `path` is a switch.
pub fn is_switch(path: &[u8]) -> bool {
    SWITCHES.contains(&path)
}

/// Whether `path` is the file of the calling thread.
pub fn is_own(path: &[u8]) -> bool {
    path == format!("/proc/self/task/{}/fail-nth", sys::thread_id()).as_bytes()
}

/// The open file. It applies to whichever thread uses it.
#[derive(Debug)]
pub struct FailNthFile;

impl File for FailNthFile {
    fn name(&self) -> String {
        "fail-nth".to_owned()
    }

    fn call(&self, caller: &dyn Caller, call: Call) -> Result<Answer, Errno> {
        if !caller.process().is_own() {
            return Err(Errno::EPERM);
        }
        match call {
            Call::Read { to, count, offset } => {
                let text = format!("{}\n", fail_nth());
                let from = usize::try_from(offset.unwrap_or(0)).unwrap_or(usize::MAX);
                let rest = text.as_bytes().get(from..).unwrap_or_default();
                let rest = rest.get(..count as usize).unwrap_or(rest);
                caller.write(to, rest).map_err(|_| Errno::EFAULT)?;
                Ok(Answer::from(rest.len() as i64))
            }
            Call::Write { from, count, .. } => {
                let mut bytes = [0; 20];
                let bytes = bytes.get_mut(..count as usize).ok_or(Errno::EINVAL)?;
                caller.read(from, bytes).map_err(|_| Errno::EFAULT)?;
                let number =
                    std::str::from_utf8(bytes).ok().and_then(|text| text.trim().parse().ok());
                set_fail_nth(number.ok_or(Errno::EINVAL)?);
                Ok(Answer::from(count as i64))
            }
            Call::Ioctl { .. } => Err(Errno::ENOTTY),
        }
    }
}
