// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Unmapping, which drops the objects' lock while access objects unpin.

use crate::host::objects::{Stop, Unmap};
use crate::host::refusal::{refuse, Outcome};
use crate::EmulatedHost;
use twostage::iommufd::{Errno, ObjectId};

/// How often access objects are told to unpin one area before that counts as a deadlock.
const TRIES: u32 = 100;

impl EmulatedHost {
    /// `IOMMU_IOAS_UNMAP`; returns the bytes unmapped.
    pub(crate) fn unmap(&self, ioas: ObjectId, iova: u64, length: u64) -> Outcome<u64> {
        self.objects().table().ioas(ioas)?;
        let mut unmap = Unmap::of_ioctl(ioas, iova, length)?;
        self.finish_unmap(&mut unmap)?;
        if unmap.bytes == 0 && length != u64::MAX {
            return refuse(Errno::ENOENT, format!("nothing is mapped at {iova:#x}+{length:#x}"));
        }
        Ok(unmap.bytes)
    }

    /// Continues `unmap` until it is done.
    ///
    /// # Errors
    /// As [`crate::host::objects::Objects::unmap`]; `EDEADLK` an access object does not unpin.
    pub(crate) fn finish_unmap(&self, unmap: &mut Unmap) -> Outcome<()> {
        let mut tries = 0;
        let mut waits_for = None;
        loop {
            let mut objects = self.objects();
            let Stop::Pinned(iova, length) = objects.unmap(unmap)? else { return Ok(()) };
            let listeners = objects.unmap_listeners(unmap.ioas)?;
            drop(objects);
            tries = if waits_for.replace(iova) == Some(iova) { tries + 1 } else { 1 };
            if tries > TRIES {
                return refuse(Errno::EDEADLK, format!("{iova:#x}+{length:#x} stays pinned"));
            }
            listeners.iter().for_each(|listener| listener.unmap(iova, length));
        }
    }
}
