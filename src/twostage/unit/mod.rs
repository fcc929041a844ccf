// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! One way in: a virtual IOMMU joined with its host side, for a VMM to use as one part.
//!
//! [`VtdBuilder`] and [`Smmuv3Builder`] take all that cannot have a default (guest memory twice: as
//! the host has it, and as the model reads it; where interrupts go) and make the model, its nesting
//! and the way of faults back to it. [`Vtd`] and [`Smmuv3`] then have the verbs that a VMM needs,
//! the same ones: register accesses, devices that come and go, snapshot, reset and the end. Each
//! error names the device and what it lacks, and leaves nothing of it on the host, unless the host
//! refuses to release it: [`AddError::Left`] says so, and builders log it.
//!
//! The parts can be used by themselves as well: [`crate::viommu`] and [`crate::nesting`].
//!
//! # From start to end
//! The VMM binds devices to its host, maps guest memory in a [`GuestIoas`] and builds. To move a
//! machine: it stops vCPUs and devices, takes the snapshot, saves memory, and elsewhere binds, maps
//! and calls `restore` instead of `build`. To end: `halt`, join the threads, `shutdown` (or drop,
//! which logs the errors that `shutdown` returns).
//!
//! # Devices of several hosts
//! Assigned devices may be of one host, and emulated ones of another. Guest memory is mapped in an
//! IOAS of each; `device_on` and `add_device_on` say which a device uses. The guest is offered what
//! all hosts can do, and what it invalidates is invalidated on all of them before it is told so.
//! A host that fails blocks its own devices, and the guest gets the error.

pub mod smmuv3;
#[cfg(test)]
mod tests;
pub mod vtd;

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;

use crate::iommufd::ObjectId;
use crate::nesting::{GuestIoas, NestingError};
use crate::spec::pci::Bdf;
use crate::sync::Mutex;
use crate::viommu::{CapabilityConflict, HostSideError, IntersectError, RestoreError};
pub use smmuv3::{Smmuv3, Smmuv3Builder};
pub use vtd::{Vtd, VtdBuilder};

/// Why a virtual IOMMU is not built or restored. Nothing of it is left on the host, unless
/// that refuses to release it, which is logged.
#[derive(Debug, Clone, thiserror::Error)]
#[non_exhaustive]
pub enum BuildError {
    /// Without a device, nobody knows what the host can do.
    #[error(
        "the virtual {model} has no devices: add them with device(), or say without_devices() if \
         they come later"
    )]
    NoDevices {
        /// VT-d or SMMUv3.
        model: &'static str,
    },
    /// No virtual IOMMU has such a configuration.
    #[error("impossible configuration of the virtual {model}: {what}")]
    Config {
        /// VT-d or SMMUv3.
        model: &'static str,
        /// What is impossible.
        what: String,
    },
    /// A device cannot be behind it.
    #[error(transparent)]
    Add(#[from] AddError),
    /// The snapshot has more devices.
    #[error("the {model} snapshot has {requester}, which was not given: add it with device()")]
    Absent {
        /// VT-d or SMMUv3.
        model: &'static str,
        /// The function, or the stream.
        requester: String,
    },
    /// The snapshot has fewer devices.
    #[error("{device} was given as {rid}, which the snapshot has not: add it after the restore")]
    NotInSnapshot {
        /// The VMM's name of the device.
        device: String,
        /// Its identity for the guest.
        rid: Bdf,
    },
    /// A guest keeps what it was offered.
    #[error(
        "config() was given {given}, but the {model} snapshot has {saved}: leave config() out \
         before restore(), or give it the snapshot's"
    )]
    OtherConfig {
        /// VT-d or SMMUv3.
        model: &'static str,
        /// What was given, where it differs.
        given: String,
        /// The same of the snapshot.
        saved: String,
    },
    /// The snapshot is not one that can be restored here.
    #[error(transparent)]
    Restore(#[from] RestoreError),
}

/// Why a device is not added. Nothing of it is left on the host, and it is blocked, except with
/// [`AddError::Left`].
#[derive(Debug, Clone, thiserror::Error)]
#[non_exhaustive]
pub enum AddError {
    /// It is behind another kind of IOMMU, or behind none.
    #[error("{device} is not behind {a_model}, which a virtual one needs: leave it out")]
    WrongIommu {
        /// The VMM's name of the device.
        device: String,
        /// "a VT-d" or "an SMMUv3".
        a_model: &'static str,
    },
    /// Its IOMMU lacks what the guest is, or was, offered.
    #[error(transparent)]
    Lacks(#[from] CapabilityConflict),
    /// Another device has its place.
    #[error("{device} cannot be {rid}, which is {other}: remove that first, or use another place")]
    Exists {
        /// The VMM's name of the device.
        device: String,
        /// The identity for the guest.
        rid: Bdf,
        /// The VMM's name of the device that has it.
        other: String,
    },
    /// The host refused to take it.
    #[error("{device} cannot be added: {source}")]
    Nesting {
        /// The VMM's name of the device.
        device: String,
        /// What was refused.
        source: NestingError,
    },
    /// The host refused what the guest's tables have for it, or bypass while there are none.
    #[error("{device} was not added, as the host refused its translation: {source}")]
    Refused {
        /// The VMM's name of the device.
        device: String,
        /// The host's answer.
        source: HostSideError,
    },
    /// It was not added, and the host does not let go of it: it may still reach memory.
    #[error("{why}; it is left on the host, remove it from {rid} to try again: {source}")]
    Left {
        /// The identity for the guest, which knows no such device.
        rid: Bdf,
        /// Why it was not added.
        why: Box<AddError>,
        /// What was refused.
        source: NestingError,
    },
}

/// Why a device is not removed.
#[derive(Debug, Clone, thiserror::Error)]
#[non_exhaustive]
pub enum RemoveError {
    /// There is none.
    #[error("no device was added as {rid}")]
    Unknown {
        /// The identity for the guest.
        rid: Bdf,
    },
    /// The host does not let go of it. The guest has it no longer; the removal can be repeated.
    #[error("{device} is not removed from the host yet, try again: {source}")]
    Host {
        /// The VMM's name of the device.
        device: String,
        /// What was refused.
        source: NestingError,
    },
}

/// A device that is to be behind a virtual IOMMU.
#[derive(Debug, Clone)]
struct NewDevice {
    rid: Bdf,
    dev: ObjectId,
    name: String,
    /// Guest memory on its host, if that is not the builder's own.
    ioas: Option<Arc<GuestIoas>>,
}

impl NewDevice {
    fn new(
        ioas: Option<&Arc<GuestIoas>>,
        rid: Bdf,
        dev: ObjectId,
        name: impl Into<String>,
    ) -> Self {
        Self { rid, dev, name: name.into(), ioas: ioas.cloned() }
    }
}

/// What the guest is offered: `lowered`, or `wanted` as it is if there are no devices, which a
/// builder was told.
fn offered<C>(wanted: C, lowered: Result<C, IntersectError>) -> Result<C, AddError> {
    match lowered {
        Ok(lowered) => Ok(lowered),
        Err(IntersectError::NoHosts) => Ok(wanted),
        Err(IntersectError::Lacks(conflict)) => Err(conflict.into()),
    }
}

/// Checks that `devices` are those of a snapshot of `model`, which has `rids`.
fn check_devices(
    model: &'static str,
    rids: &[Bdf],
    devices: &[NewDevice],
) -> Result<(), BuildError> {
    if let Some(NewDevice { rid, name, .. }) =
        devices.iter().find(|device| !rids.contains(&device.rid))
    {
        return Err(BuildError::NotInSnapshot { device: name.clone(), rid: *rid });
    }
    match rids.iter().find(|rid| !devices.iter().any(|device| device.rid == **rid)) {
        Some(rid) => Err(BuildError::Absent { model, requester: rid.to_string() }),
        None => Ok(()),
    }
}

/// Checks that `given`, the configuration that a builder was told of if any, is that of a snapshot
/// of `model`, which has `saved`.
fn check_config<C: fmt::Debug + PartialEq>(
    model: &'static str,
    given: Option<&C>,
    saved: &C,
) -> Result<(), BuildError> {
    let Some(given) = given.filter(|given| *given != saved) else { return Ok(()) };
    let (given, saved) = (format!("{given:?}"), format!("{saved:?}"));
    // Fields, of which one differs, as they are compared and shown by derived traits.
    let mut fields = given.split(", ").zip(saved.split(", "));
    let (given, saved) = fields.find(|(given, saved)| given != saved).unwrap_or((&given, &saved));
    Err(BuildError::OtherConfig { model, given: given.to_owned(), saved: saved.to_owned() })
}

/// The names of `devices`, each of which has a place of its own.
fn names_of(devices: &[NewDevice]) -> Result<BTreeMap<Bdf, String>, AddError> {
    let mut names = BTreeMap::new();
    for device in devices {
        check_place(&names, device)?;
        names.insert(device.rid, device.name.clone());
    }
    Ok(names)
}

/// Checks that no other device is in the place of `device`.
fn check_place(names: &BTreeMap<Bdf, String>, device: &NewDevice) -> Result<(), AddError> {
    let NewDevice { rid, name, .. } = device;
    match names.get(rid) {
        Some(other) => {
            Err(AddError::Exists { device: name.clone(), rid: *rid, other: other.clone() })
        }
        None => Ok(()),
    }
}

/// The VMM's names of the devices behind a virtual IOMMU. Its lock is taken before all others, and
/// held while one is added or removed, and by what must not see half of one.
#[derive(Debug)]
struct Names(Mutex<BTreeMap<Bdf, String>>);

impl Names {
    /// Does `work` while no device is being added or removed.
    fn with_whole_devices<T>(&self, work: impl FnOnce() -> T) -> T {
        let _names = self.0.lock();
        work()
    }

    /// Adds `device` with `add`, if its place is free. If that fails, `release` takes back what the
    /// host side has of it.
    fn add(
        &self,
        device: NewDevice,
        add: impl FnOnce(&NewDevice) -> Result<(), AddError>,
        release: impl FnOnce(Bdf) -> Result<(), NestingError>,
    ) -> Result<(), AddError> {
        let mut names = self.0.lock();
        check_place(&names, &device)?;
        let added = add(&device);
        let NewDevice { rid, name, .. } = device;
        let Err(why) = added else {
            names.insert(rid, name);
            return Ok(());
        };
        Err(match release(rid) {
            Ok(()) | Err(NestingError::NoDevice(_)) => why,
            Err(source) => AddError::Left { rid, why: Box::new(why), source },
        })
    }

    /// Removes `rid` with `remove`.
    fn remove(
        &self,
        rid: Bdf,
        remove: impl FnOnce(Bdf) -> Result<(), NestingError>,
    ) -> Result<(), RemoveError> {
        let mut names = self.0.lock();
        match remove(rid) {
            Ok(()) => {}
            Err(NestingError::NoDevice(_)) => return Err(RemoveError::Unknown { rid }),
            Err(source) => {
                let device = names.get(&rid).cloned().unwrap_or_else(|| rid.to_string());
                return Err(RemoveError::Host { device, source });
            }
        }
        names.remove(&rid);
        Ok(())
    }
}
