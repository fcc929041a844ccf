// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The guest's memory as one IOAS.

use crate::sync::Mutex;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, MutexGuard};

use super::{hw_info, Context, NestingError, Result};
use crate::iommufd::{HostIommu, HwInfo, MapTarget, ObjectId, Protection, UserMemory};
use crate::spec::pci::Bdf;

/// The guest's memory map (GPA → host memory) as one IOAS of the host, shared by every virtual
/// IOMMU of the guest and by devices without one, so that memory is pinned and accounted once.
///
/// The IOAS is destroyed with the last reference. Its lock is taken after the lock of a virtual
/// IOMMU's nesting.
///
/// ```
/// use std::sync::Arc;
/// use twostage::iommufd::{HostIommu, Protection, UserMemory};
/// use twostage::nesting::vtd::VtdNesting;
/// use twostage::nesting::{GuestIoas, NestingError};
///
/// fn host_side(
///     host: Arc<dyn HostIommu>,
///     ram: &UserMemory,
/// ) -> Result<(VtdNesting, VtdNesting), NestingError> {
///     let ioas = GuestIoas::new(host)?;
///     ioas.map(0, ram, Protection::READ_WRITE)?;
///     Ok((VtdNesting::new(ioas.clone()), VtdNesting::new(ioas)))
/// }
/// ```
#[derive(Debug)]
pub struct GuestIoas {
    host: Arc<dyn HostIommu>,
    id: ObjectId,
    /// Somebody else destroys it.
    given_up: bool,
    users: Mutex<Users>,
}

/// An IOMMU with erratum 772415 may write through a read-only stage 2 when it nests.
#[derive(Debug, Default)]
pub(super) struct Users {
    /// Start addresses of read-only mappings, in bytes.
    read_only: BTreeSet<u64>,
    /// The devices behind an IOMMU with the erratum.
    erratum: BTreeMap<ObjectId, Bdf>,
}

impl GuestIoas {
    /// Creates an empty IOAS on `host`.
    ///
    /// # Errors
    /// The host's error.
    pub fn new(host: Arc<dyn HostIommu>) -> Result<Arc<Self>> {
        let id = host.ioas_alloc().context(|| "allocating the IOAS".into())?;
        Ok(Arc::new(Self { host, id, given_up: false, users: Mutex::default() }))
    }

    /// The host it belongs to.
    pub fn host(&self) -> &Arc<dyn HostIommu> {
        &self.host
    }

    /// The object to which a device is attached that may access all guest memory.
    pub fn id(&self) -> ObjectId {
        self.id
    }

    /// Maps `memory` at `gpa` (bytes, aligned as the host requires), for every device.
    ///
    /// # Errors
    /// The host refuses; or the mapping is read-only and the IOMMU of a device cannot enforce that
    /// under nested translation (erratum 772415).
    pub fn map(&self, gpa: u64, memory: &UserMemory, access: Protection) -> Result<()> {
        let mut users = self.users();
        if !access.write {
            users.check_read_only(gpa)?;
        }
        self.host
            .ioas_map(self.id, memory, MapTarget::Fixed(gpa), access)
            .context(|| format!("mapping guest memory at {gpa:#x}"))?;
        if !access.write {
            users.mapped_read_only(gpa);
        }
        Ok(())
    }

    /// Unmaps `length` bytes at `gpa`, which must be whole mappings.
    ///
    /// # Errors
    /// The host refuses: nothing is mapped there, or a mapping would be split.
    pub fn unmap(&self, gpa: u64, length: u64) -> Result<()> {
        let mut users = self.users();
        self.host
            .ioas_unmap(self.id, gpa, length)
            .context(|| format!("unmapping guest memory at {gpa:#x}"))?;
        users.unmapped(gpa, length);
        Ok(())
    }

    /// Its users, locked: mapping and adding devices exclude each other.
    pub(super) fn users(&self) -> MutexGuard<'_, Users> {
        self.users.lock()
    }

    /// Gives up this reference; returns the object to the last owner, to be destroyed.
    pub(super) fn give_up(self: Arc<Self>) -> Option<ObjectId> {
        let mut last = Arc::into_inner(self)?;
        last.given_up = true;
        Some(last.id)
    }
}

impl Drop for GuestIoas {
    fn drop(&mut self) {
        if self.given_up {
            return;
        }
        // Retry once: nobody else will.
        if let Err(error) = self.host.destroy(self.id).or_else(|_| self.host.destroy(self.id)) {
            log::error!("guest memory stays mapped: {error}");
        }
    }
}

impl Users {
    /// Checks whether memory may be mapped read-only at `gpa`.
    fn check_read_only(&self, gpa: u64) -> Result<()> {
        match self.erratum.values().next() {
            Some(rid) => Err(NestingError::ReadOnlyErratum { gpa, rid: *rid }),
            None => Ok(()),
        }
    }

    /// Memory is mapped read-only at `gpa`.
    fn mapped_read_only(&mut self, gpa: u64) {
        self.read_only.insert(gpa);
    }

    /// `length` bytes at `gpa` are unmapped.
    fn unmapped(&mut self, gpa: u64, length: u64) {
        let last = gpa.saturating_add(length.saturating_sub(1));
        self.read_only.retain(|start| !(gpa..=last).contains(start));
    }

    /// Adds `dev`, the guest's `rid`, which will nest on the IOAS, if that is allowed.
    pub fn add_device(&mut self, rid: Bdf, dev: ObjectId, info: &HwInfo) -> Result<()> {
        if !hw_info::writes_through_read_only(info) {
            return Ok(());
        }
        if let Some(gpa) = self.read_only.first() {
            return Err(NestingError::ReadOnlyErratum { gpa: *gpa, rid });
        }
        self.erratum.insert(dev, rid);
        Ok(())
    }

    /// `dev` no longer nests on the IOAS.
    pub fn remove_device(&mut self, dev: ObjectId) {
        self.erratum.remove(&dev);
    }
}
