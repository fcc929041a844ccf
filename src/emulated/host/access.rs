// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Access objects: how a device without an IOMMU uses an IOAS.
//!
//! A mediated device, whose DMA is done by software, or a vDPA-like one attaches to an IOAS by an
//! [`Access`] and accesses memory by IOVA like a PCI device behind an IOMMU. They share its pages,
//! which are pinned and accounted once.

use std::borrow::Cow;
use std::sync::{Arc, MutexGuard};

use crate::host::context::Context;
use crate::host::objects::{AccessUnmap, Objects, Wanted};
use crate::host::refusal::{refuse, Outcome, Refusal};
use crate::ioas::Transfer;
use crate::EmulatedHost;
use twostage::iommufd::{Errno, ObjectId, UserMemory};

/// Why an operation of an access object failed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{errno}: {detail}")]
#[non_exhaustive]
pub struct AccessError {
    /// Linux's error number.
    pub errno: Errno,
    detail: Cow<'static, str>,
}

impl From<Refusal> for AccessError {
    fn from(refusal: Refusal) -> Self {
        Self { errno: refusal.errno, detail: refusal.detail }
    }
}

/// The result of an [`Access`]'s methods.
type Result<T> = std::result::Result<T, AccessError>;

/// An access object, destroyed on drop.
#[derive(Debug)]
pub struct Access {
    context: Arc<Context>,
    id: ObjectId,
    /// The object table that the ID belongs to.
    epoch: u64,
}

impl EmulatedHost {
    /// Creates an access object, attached to nothing. Only one with a listener for unmaps can pin
    /// pages; IOVAs, lengths and memory of its IOAS must then be page-aligned.
    ///
    /// # Errors
    /// `ENOMEM` no object ID is left.
    pub fn access_create(&self, unmap: Option<Arc<dyn AccessUnmap>>) -> Result<Access> {
        let mut objects = self.objects();
        let id = objects.access_create(unmap)?;
        Ok(Access { context: self.context().clone(), id, epoch: objects.epoch() })
    }
}

impl Context {
    /// Moves the access object `id` from its IOAS to another or none, notifying listeners.
    fn move_access(&self, id: ObjectId, new: Option<ObjectId>) -> Outcome<()> {
        let Some(listener) = self.objects().access_start_move(id, new)? else { return Ok(()) };
        if let Some(listener) = listener {
            listener.unmap(0, u64::MAX);
        }
        self.objects().access_finish_move(id, new)
    }

    /// Detaches every access object, before the iommufd is closed.
    pub(crate) fn detach_accesses(&self) {
        let attached = self.objects().attached_accesses();
        for id in attached {
            // Fails if the object was destroyed or detaches concurrently.
            let _ = self.move_access(id, None);
        }
    }
}

/// A change of an access object's IOAS.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Move {
    Attach,
    Replace,
    Detach,
}

impl Access {
    /// Its object ID, unless the iommufd was closed.
    pub fn id(&self) -> ObjectId {
        self.id
    }

    /// Attaches it to `ioas`.
    ///
    /// # Errors
    /// `EINVAL` it is attached; `ENOENT` no such IOAS; `EADDRINUSE` something there is not
    /// page-aligned.
    pub fn attach(&self, ioas: ObjectId) -> Result<()> {
        Ok(self.change(Some(ioas), Move::Attach)?)
    }

    /// Moves it from its IOAS to `ioas`. The listener is notified that everything is unmapped.
    ///
    /// # Errors
    /// `ENOENT` it is not attached, or no such IOAS; `EADDRINUSE` as [`Self::attach`].
    pub fn replace(&self, ioas: ObjectId) -> Result<()> {
        Ok(self.change(Some(ioas), Move::Replace)?)
    }

    /// Detaches it from its IOAS, like [`Self::replace`]. Does nothing if it has none.
    ///
    /// # Errors
    /// `EBUSY` it is already being moved.
    pub fn detach(&self) -> Result<()> {
        Ok(self.change(None, Move::Detach)?)
    }

    /// Pins the pages of `length` bytes at `iova`, which must start at a page boundary and,
    /// wherever a mapping ends within, end at one. Returns the memory in ascending pieces.
    ///
    /// # Errors
    /// `EINVAL` it has no listener, empty, not whole pages, being unmapped; `EOVERFLOW` past the
    /// end of the address space; `ENOENT` not attached or not mapped; `EPERM` the mapping does not
    /// allow it; `EFAULT` there is no memory; `ENOMEM` the memory-lock limit. Nothing is pinned
    /// then.
    pub fn pin_pages(&self, iova: u64, length: u64, write: bool) -> Result<Vec<UserMemory>> {
        let wanted = if write { Wanted::Write } else { Wanted::Read };
        Ok(self.objects()?.access_pin(self.id, iova, length, wanted)?)
    }

    /// Unpins what one call of [`Self::pin_pages`] with the same range pinned.
    ///
    /// # Errors
    /// `EINVAL` there was no such call.
    pub fn unpin_pages(&self, iova: u64, length: u64) -> Result<()> {
        Ok(self.objects()?.access_unpin(self.id, iova, length)?)
    }

    /// Reads memory at `iova`.
    ///
    /// # Errors
    /// As [`Self::pin_pages`], without alignment; what precedes the failing mapping may have been
    /// read.
    pub fn read(&self, iova: u64, bytes: &mut [u8]) -> Result<()> {
        self.transfer(iova, Transfer::Read(bytes))
    }

    /// Writes memory at `iova`.
    ///
    /// # Errors
    /// As [`Self::read`].
    pub fn write(&self, iova: u64, bytes: &[u8]) -> Result<()> {
        self.transfer(iova, Transfer::Write(bytes))
    }

    fn transfer(&self, iova: u64, transfer: Transfer<'_>) -> Result<()> {
        Ok(self.objects()?.access_transfer(self.id, iova, transfer)?)
    }

    fn change(&self, new: Option<ObjectId>, how: Move) -> Outcome<()> {
        let current = self.objects()?.access_ioas(self.id)?;
        match (how, current) {
            (Move::Attach, Some(ioas)) => {
                refuse(Errno::EINVAL, format!("access object {} has IOAS {ioas}", self.id))
            }
            (Move::Replace, None) => {
                refuse(Errno::ENOENT, format!("access object {} has no IOAS", self.id))
            }
            _ => self.context.move_access(self.id, new),
        }
    }

    /// The objects, if the access object is still one of them.
    fn objects(&self) -> Outcome<MutexGuard<'_, Objects>> {
        let objects = self.context.objects();
        if objects.epoch() != self.epoch {
            return refuse(Errno::ENOENT, "the iommufd was closed");
        }
        Ok(objects)
    }
}

impl Drop for Access {
    fn drop(&mut self) {
        // They fail if the iommufd was closed: then it is already destroyed.
        let _ = self.detach();
        let _ = self.objects().and_then(|mut objects| objects.access_destroy(self.id));
    }
}
