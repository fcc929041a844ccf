// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The common base of nesting for all architectures: the host, the guest's memory, objects to be
//! destroyed, and the bookkeeping of `HWPT_NESTED` objects.

use std::collections::BTreeMap;
use std::sync::Arc;

use super::guest_ioas::GuestIoas;
use super::{Context, NestingError, Result};
use crate::iommufd::{Errno, Extensions, HostIommu, HwptAlloc, HwptData, HwptFlags, ObjectId};
use crate::spec::pci::Bdf;
use crate::warn_limited;

/// At most this many objects may be waiting to be destroyed after a failure; beyond that no HWPT is
/// created, so that a guest cannot accumulate host objects.
const MAX_DOOMED: usize = 16;

/// The host, as one virtual IOMMU uses it.
#[derive(Debug)]
pub(super) struct Objects {
    host: Arc<dyn HostIommu>,
    calls: u64,
    /// Destroyed by the last owner.
    ioas: Option<Arc<GuestIoas>>,
    doomed: Vec<ObjectId>,
}

impl Objects {
    /// With the guest's memory `ioas`.
    pub fn new(ioas: Arc<GuestIoas>) -> Self {
        Self { host: ioas.host().clone(), calls: 0, ioas: Some(ioas), doomed: Vec::new() }
    }

    /// The host, for one call, which is counted.
    pub fn host(&mut self) -> &dyn HostIommu {
        self.calls += 1;
        &*self.host
    }

    /// The number of calls, of any verb.
    pub fn calls(&self) -> u64 {
        self.calls
    }

    /// The host's abilities beyond the uAPI.
    pub fn extensions(&self) -> Extensions {
        self.host.extensions()
    }

    /// The IOAS, until it is given up.
    pub fn ioas(&self) -> Result<Arc<GuestIoas>> {
        self.ioas.clone().ok_or(NestingError::ShutDown)
    }

    /// Allocates a nesting parent, a stage 2 of guest memory, that `dev`, the guest's `rid`, can
    /// use.
    pub fn alloc_parent(&mut self, rid: Bdf, dev: ObjectId, pasid: bool) -> Result<ObjectId> {
        let flags = HwptFlags::new().with_nest_parent(true).with_pasid(pasid);
        let pt = self.ioas()?.id();
        self.alloc_paging(flags, dev, pt, || format!("allocating a nesting parent for {rid}"))
    }

    /// Allocates a `HWPT_PAGING` on the IOAS `pt` for `dev`.
    pub fn alloc_paging(
        &mut self,
        flags: HwptFlags,
        dev: ObjectId,
        pt: ObjectId,
        what: impl Fn() -> String,
    ) -> Result<ObjectId> {
        let args = HwptAlloc { flags, dev, pt, data: HwptData::None, fault: None };
        self.alloc_hwpt(&args, what)
    }

    /// Allocates a HWPT.
    pub fn alloc_hwpt(&mut self, args: &HwptAlloc, what: impl Fn() -> String) -> Result<ObjectId> {
        self.check_doomed(&what)?;
        self.host().hwpt_alloc(args).context(what)
    }

    /// Allocates an empty IOAS.
    pub fn alloc_ioas(&mut self, what: impl Fn() -> String) -> Result<ObjectId> {
        self.check_doomed(&what)?;
        self.host().ioas_alloc().context(what)
    }

    fn check_doomed(&mut self, what: impl Fn() -> String) -> Result<()> {
        match self.doomed.len() {
            MAX_DOOMED.. => self.sweep().context(what),
            _ => Ok(()),
        }
    }

    /// Detaches `dev`, or its `pasid`. Only a detach is certain to block it, so a failed one is
    /// retried once. A device that no longer exists (`ENOENT`) is attached to nothing.
    pub fn detach(&mut self, dev: ObjectId, pasid: Option<u32>) -> crate::iommufd::Result<()> {
        let mut result = self.host().device_detach(dev, pasid);
        if result.is_err() {
            result = self.host().device_detach(dev, pasid);
        }
        match result {
            Err(error) if error.errno != Errno::ENOENT => Err(error),
            _ => Ok(()),
        }
    }

    /// Destroys an unused object; if the host fails, it is retried later.
    pub fn destroy(&mut self, id: ObjectId) {
        self.doomed.push(id);
        self.destroy_owed();
    }

    /// Tries again to destroy what could not be: to the host, that is in use.
    pub fn destroy_owed(&mut self) {
        if let Err(error) = self.sweep() {
            warn_limited!("will be retried: {error}");
        }
    }

    /// Gives up the IOAS, and destroys what is left. To be called when nothing uses it any more;
    /// may be called again to retry.
    pub fn end(&mut self) -> Result<()> {
        self.doomed.extend(self.ioas.take().and_then(GuestIoas::give_up));
        self.sweep().or_else(|_| self.sweep()).context(|| "destroying the last host objects".into())
    }

    /// Destroys the waiting objects in order: users before what they use.
    fn sweep(&mut self) -> crate::iommufd::Result<()> {
        let mut result = Ok(());
        for id in std::mem::take(&mut self.doomed) {
            match self.host().destroy(id) {
                Err(error) if error.errno != Errno::ENOENT => {
                    self.doomed.push(id);
                    result = Err(error);
                }
                _ => {}
            }
        }
        result
    }
}

#[derive(Debug)]
struct Nested<S> {
    stage1: S,
    users: usize,
}

/// All `HWPT_NESTED` objects, one for each stage 1. Bookkeeping only: nothing here calls the host.
#[derive(Debug)]
pub(super) struct NestedHwpts<S> {
    by_id: BTreeMap<ObjectId, Nested<S>>,
    by_stage1: BTreeMap<S, ObjectId>,
}

impl<S> Default for NestedHwpts<S> {
    fn default() -> Self {
        Self { by_id: BTreeMap::new(), by_stage1: BTreeMap::new() }
    }
}

impl<S: Copy + Ord> NestedHwpts<S> {
    /// The HWPT for `stage1`.
    pub fn find(&self, stage1: &S) -> Option<ObjectId> {
        self.by_stage1.get(stage1).copied()
    }

    /// Adds a new HWPT without users.
    pub fn insert(&mut self, hwpt: ObjectId, stage1: S) {
        self.by_id.insert(hwpt, Nested { stage1, users: 0 });
        self.by_stage1.insert(stage1, hwpt);
    }

    /// The stage 1 of a HWPT.
    pub fn stage1(&self, hwpt: ObjectId) -> Option<S> {
        self.by_id.get(&hwpt).map(|nested| nested.stage1)
    }

    /// Adds a user to a HWPT. Does nothing for another object.
    pub fn join(&mut self, hwpt: ObjectId) {
        if let Some(nested) = self.by_id.get_mut(&hwpt) {
            nested.users += 1;
        }
    }

    /// Removes a user from a HWPT.
    pub fn leave(&mut self, hwpt: ObjectId) {
        if let Some(nested) = self.by_id.get_mut(&hwpt) {
            // A user that leaves has joined.
            nested.users -= 1;
        }
    }

    /// Removes a HWPT without users. Returns whether it did.
    pub fn remove_unused(&mut self, hwpt: ObjectId) -> bool {
        match self.by_id.get(&hwpt) {
            Some(nested) if nested.users == 0 => {
                self.by_stage1.remove(&nested.stage1);
                self.by_id.remove(&hwpt);
                true
            }
            _ => false,
        }
    }

    /// Every HWPT with users, from `from`, ascending.
    pub fn used_from(&self, from: ObjectId) -> impl Iterator<Item = ObjectId> + '_ {
        self.by_id.range(from..).filter(|(_, nested)| nested.users != 0).map(|(hwpt, _)| *hwpt)
    }

    /// Every HWPT with its stage 1, ascending.
    pub fn iter(&self) -> impl Iterator<Item = (ObjectId, S)> + '_ {
        self.by_id.iter().map(|(hwpt, nested)| (*hwpt, nested.stage1))
    }

    /// Removes every HWPT.
    pub fn take_all(&mut self) -> Vec<ObjectId> {
        self.by_stage1.clear();
        std::mem::take(&mut self.by_id).into_keys().collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_hwpt_is_found_by_its_stage_1_until_its_last_user_is_gone() {
        let hwpt = ObjectId(2);
        let mut books = NestedHwpts::default();
        books.insert(hwpt, 'a');
        assert_eq!((books.find(&'a'), books.find(&'b')), (Some(hwpt), None));
        assert_eq!(books.used_from(ObjectId(0)).count(), 0);
        books.join(hwpt);
        books.join(hwpt);
        books.join(ObjectId(3));
        books.leave(hwpt);
        assert!(!books.remove_unused(hwpt));
        assert!(books.used_from(hwpt).eq([hwpt]) && books.used_from(ObjectId(3)).next().is_none());
        books.leave(hwpt);
        assert!(books.remove_unused(hwpt) && !books.remove_unused(hwpt));
        assert_eq!((books.find(&'a'), books.stage1(hwpt)), (None, None));
        books.insert(hwpt, 'a');
        assert_eq!((books.take_all(), books.find(&'a')), (vec![hwpt], None));
    }
}
