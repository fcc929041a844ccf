// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! `mmap(2)` on an iommufd: pages of an IOMMU mapped by a user.

use std::fs::File;
use std::sync::Arc;

use crate::host::context::Context;
use crate::host::mmaps::Mmap;
use crate::ioas::PAGE_SIZE;
use crate::EmulatedHost;
use twostage::iommufd::Errno;

/// The arguments of an `mmap(2)`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MmapRequest {
    /// Offset in the descriptor, in bytes.
    pub offset: u64,
    /// Length in bytes.
    pub length: u64,
    /// `MAP_SHARED`.
    pub shared: bool,
    /// `PROT_EXEC`.
    pub executable: bool,
}

/// Pages of an IOMMU that a user has mapped, until it is dropped: their owner cannot be destroyed,
/// and the iommufd stays open.
#[derive(Debug)]
pub struct MappedPages {
    mmap: Mmap,
    epoch: u64,
    context: Arc<Context>,
}

impl MappedPages {
    /// The file to map instead of the iommufd, from its start.
    pub fn file(&self) -> &File {
        &self.mmap.file
    }
}

impl Clone for MappedPages {
    /// The same pages, mapped once more (`fork(2)`).
    fn clone(&self) -> Self {
        self.context.objects().map_pages(self.epoch, self.mmap.owner);
        Self { mmap: self.mmap.clone(), epoch: self.epoch, context: self.context.clone() }
    }
}

impl Drop for MappedPages {
    fn drop(&mut self) {
        self.context.objects().unmap_pages(self.epoch, self.mmap.owner);
    }
}

impl EmulatedHost {
    /// `mmap(2)` on `/dev/iommu`: what to map instead.
    ///
    /// # Errors
    /// `EINVAL` not a whole number of pages, or not shared; `EPERM` executable; `ENXIO` not exactly
    /// what a driver has offered.
    pub fn mmap(&self, request: MmapRequest) -> Result<MappedPages, Errno> {
        let MmapRequest { offset, length, shared, executable } = request;
        if !length.is_multiple_of(PAGE_SIZE) || !shared {
            return Err(Errno::EINVAL);
        }
        if executable {
            return Err(Errno::EPERM);
        }
        let mut objects = self.objects();
        let mmap = objects.mmaps().get(offset, length).ok_or(Errno::ENXIO)?;
        let epoch = objects.epoch();
        objects.map_pages(epoch, mmap.owner);
        Ok(MappedPages { mmap, epoch, context: self.context().clone() })
    }
}
