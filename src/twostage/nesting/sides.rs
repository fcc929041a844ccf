// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The host sides of a virtual IOMMU whose devices are of several hosts: assigned ones of the
//! kernel's, and emulated ones of the process's own.
//!
//! Hosts share nothing, so each has a side: objects of its own for the tables of the guest. A
//! requester is configured on the side of its device. An invalidation goes to every side, as the
//! names in it (domains, PASIDs, ASIDs) do not say which of them caches something, and is done when
//! all are. One side that fails blocks what is its own, and does not keep the others from theirs;
//! the virtual IOMMU gets the error.
//!
//! Files named so in `vtd` and `smmuv3` have what differs.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::{Arc, Weak};

use super::{DeviceInfo, GuestIoas, NestingError, Result};
use crate::iommufd::{Extensions, HwInfo, ObjectId};
use crate::spec::pci::Bdf;
use crate::sync::Mutex;
use crate::viommu::HostSideError;

/// The host side of a virtual IOMMU on one host.
pub(crate) trait Side: fmt::Debug + Sized {
    /// The target of its faults.
    type Target: ?Sized;

    /// One of the same settings, without devices, for a guest whose memory is `ioas`.
    fn beside(&self, ioas: Arc<GuestIoas>) -> Self;
    /// The guest's memory, until it is shut down.
    fn ioas(&self) -> Result<Arc<GuestIoas>>;
    /// Adds a device of its host.
    fn add_device(&self, rid: Bdf, dev: ObjectId) -> Result<()>;
    /// Removes a device.
    fn remove_device(&self, rid: Bdf) -> Result<()>;
    /// The host's description of each device.
    fn hw_infos(&self) -> Vec<DeviceInfo>;
    /// From now on faults go to `target`.
    fn set_fault_target(&self, target: Weak<Self::Target>);
    /// Gives every host object back.
    fn shutdown(&self) -> Result<()>;
}

/// All host sides of one virtual IOMMU: at least one. See the [module](self).
///
/// Its lock is held during a look-up only: never across a call.
pub(crate) struct Sides<S: Side> {
    first: Arc<S>,
    others: Mutex<Others<S>>,
}

struct Others<S: Side> {
    /// Numbered from 1. They stay until shutdown, even without devices.
    sides: Vec<Arc<S>>,
    /// The number of the side of each device.
    of: BTreeMap<Bdf, usize>,
    target: Option<Weak<S::Target>>,
    shut_down: bool,
}

impl<S: Side> Sides<S> {
    /// Only `first`.
    pub fn new(first: S) -> Self {
        let others =
            Others { sides: Vec::new(), of: BTreeMap::new(), target: None, shut_down: false };
        Self { first: Arc::new(first), others: Mutex::new(others) }
    }

    /// The first one.
    pub fn first(&self) -> &Arc<S> {
        &self.first
    }

    /// That with `number`, counted from 0.
    pub fn get(&self, number: usize) -> Option<Arc<S>> {
        match number.checked_sub(1) {
            None => Some(self.first.clone()),
            Some(other) => self.others.lock().sides.get(other).cloned(),
        }
    }

    /// Each of them, the first one first.
    pub fn iter(&self) -> impl Iterator<Item = Arc<S>> + '_ {
        (0..).map_while(|number| self.get(number))
    }

    /// The one that has `rid`; the first one for a device that none has.
    pub fn of(&self, rid: Bdf) -> Arc<S> {
        let others = self.others.lock();
        let number = if others.sides.is_empty() { 0 } else { *others.of.get(&rid).unwrap_or(&0) };
        let other = number.checked_sub(1).and_then(|other| others.sides.get(other));
        other.unwrap_or(&self.first).clone()
    }

    /// Adds `dev` as `rid` to the side of `ioas`, which is made if there is none; without `ioas`,
    /// to the first one. Returns what its host says of it, and of itself.
    pub fn add_device(
        &self,
        ioas: Option<&Arc<GuestIoas>>,
        rid: Bdf,
        dev: ObjectId,
    ) -> Result<(HwInfo, Extensions)> {
        let side = self.side_for(ioas, rid)?;
        let added = side.ioas().and_then(|ioas| {
            side.add_device(rid, dev)?;
            Ok(ioas.host().extensions())
        });
        let extensions = added.inspect_err(|_| self.forget(rid))?;
        let known = side.hw_infos().into_iter().find(|known| known.rid == rid);
        // If not, it was shut down in between.
        known.map(|known| (known.info, extensions)).ok_or(NestingError::ShutDown)
    }

    /// The side of `ioas`, made if necessary, which is that of `rid` from now on.
    fn side_for(&self, ioas: Option<&Arc<GuestIoas>>, rid: Bdf) -> Result<Arc<S>> {
        let mut others = self.others.lock();
        if others.shut_down {
            return Err(NestingError::ShutDown);
        }
        if others.of.contains_key(&rid) {
            return Err(NestingError::DeviceExists(rid));
        }
        let is_of = |side: &S, ioas| side.ioas().is_ok_and(|its| Arc::ptr_eq(&its, ioas));
        let other = match ioas {
            None => None,
            Some(ioas) if is_of(&self.first, ioas) => None,
            Some(ioas) => Some(match others.sides.iter().position(|side| is_of(side, ioas)) {
                Some(other) => other,
                None => {
                    let side = self.first.beside(ioas.clone());
                    others.target.iter().for_each(|target| side.set_fault_target(target.clone()));
                    others.sides.push(Arc::new(side));
                    others.sides.len() - 1
                }
            }),
        };
        others.of.insert(rid, other.map_or(0, |other| other + 1));
        let side = other.and_then(|other| others.sides.get(other));
        Ok(side.unwrap_or(&self.first).clone())
    }

    fn forget(&self, rid: Bdf) {
        self.others.lock().of.remove(&rid);
    }

    /// Removes `rid` from the side that has it.
    pub fn remove_device(&self, rid: Bdf) -> Result<()> {
        self.of(rid).remove_device(rid)?;
        self.forget(rid);
        Ok(())
    }

    /// From now on the faults of all sides go to `target`, while it lives.
    pub fn set_fault_target(&self, target: Weak<S::Target>) {
        self.others.lock().target = Some(target.clone());
        self.iter().for_each(|side| side.set_fault_target(target.clone()));
    }

    /// Every side gives back what it has. May be called again to retry.
    ///
    /// # Errors
    /// The first one.
    pub fn shutdown(&self) -> Result<()> {
        self.others.lock().shut_down = true;
        let mut result = Ok(());
        for side in self.iter() {
            result = result.and(side.shutdown());
        }
        result
    }
}

impl<S: Side> fmt::Debug for Sides<S> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list().entries(self.iter()).finish()
    }
}

/// The result of two sides: the first error, and whether what either has may still be reachable.
pub(super) fn both(
    one: Result<(), HostSideError>,
    other: Result<(), HostSideError>,
) -> Result<(), HostSideError> {
    match (one, other) {
        (Err(one), Err(other)) => Err(join(one, &other)),
        (one, other) => one.and(other),
    }
}

/// `one`, in which it is said if something of `other` may still be reachable.
pub(super) fn join(one: HostSideError, other: &HostSideError) -> HostSideError {
    log::debug!("another host refused, too: {other}");
    HostSideError { still_reachable: one.still_reachable || other.still_reachable, ..one }
}
