// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Unmapping from outside the lock of the objects, which it has to leave while it waits.
#![forbid(unsafe_code)]

use super::objects::{Stop, Unmap};
use super::refusal::{refuse, Outcome};
use super::EmulatedHost;
use crate::iommufd::{Errno, ObjectId};

impl EmulatedHost {
    /// `IOMMU_IOAS_UNMAP`; returns the bytes unmapped.
    pub(super) fn unmap(&self, ioas: ObjectId, iova: u64, length: u64) -> Outcome<u64> {
        self.objects().table().ioas(ioas)?;
        let mut unmap = Unmap::of_ioctl(ioas, iova, length)?;
        self.finish_unmap(&mut unmap)?;
        if unmap.bytes == 0 && length != u64::MAX {
            return refuse(Errno::ENOENT, format!("nothing is mapped at {iova:#x}+{length:#x}"));
        }
        Ok(unmap.bytes)
    }

    /// Goes on with `unmap` until it is done or fails.
    fn finish_unmap(&self, unmap: &mut Unmap) -> Outcome<()> {
        match self.objects().unmap(unmap)? {
            Stop::Done => Ok(()),
            Stop::Pinned(..) => refuse(Errno::EDEADLK, "pinned"),
        }
    }
}
