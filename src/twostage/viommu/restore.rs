// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Common to the snapshots of all virtual IOMMUs: their versions, and why there is none, or it
//! cannot be restored.

use super::ledger::Applied;
use super::HostSideError;

/// Why there is no snapshot.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum SnapshotError {
    /// A halted virtual IOMMU drops what the guest asks for.
    #[error(
        "the virtual {model} is halted and may have dropped a command: take the snapshot before \
         halt()"
    )]
    Halted {
        /// VT-d or SMMUv3.
        model: &'static str,
    },
    /// The host has faults for the guest that were not delivered in time.
    #[error("faults of the virtual {model} are on their way: {what}")]
    Pending {
        /// VT-d or SMMUv3.
        model: &'static str,
        /// What delays them.
        what: String,
    },
}

/// Why a snapshot is not restored. The host is then as before: what it was given is blocked again,
/// except where it failed to block, see [`RestoreError::Refused`].
#[derive(Debug, Clone, thiserror::Error)]
#[non_exhaustive]
pub enum RestoreError {
    /// Another release took it.
    #[error("this {model} snapshot has version {found}; this build reads version {known}")]
    Version {
        /// VT-d or SMMUv3.
        model: &'static str,
        /// The version of the snapshot.
        found: u32,
        /// The version that this release reads and writes.
        known: u32,
    },
    /// No virtual IOMMU has such a configuration.
    #[error("this {model} snapshot has an impossible configuration: {what}")]
    Config {
        /// VT-d or SMMUv3.
        model: &'static str,
        /// What is impossible.
        what: String,
    },
    /// No virtual IOMMU has such a state.
    #[error("this {model} snapshot was changed or damaged: {what}")]
    Inconsistent {
        /// VT-d or SMMUv3.
        model: &'static str,
        /// What is inconsistent.
        what: String,
    },
    /// The host refused a decision. Whatever it was given before is blocked again, unless the
    /// source says [`HostSideError::still_reachable`]: the host then failed to block part of it.
    #[error(
        "the host refused what {requester} had at the snapshot, which is not restored: {source}"
    )]
    Refused {
        /// The function and PASID, or the stream.
        requester: String,
        /// The host's answer.
        source: HostSideError,
    },
}

/// Refuses a snapshot of another version.
pub(super) fn check_version(
    model: &'static str,
    found: u32,
    known: u32,
) -> Result<(), RestoreError> {
    if found == known {
        return Ok(());
    }
    Err(RestoreError::Version { model, found, known })
}

/// Gives `all` decisions to the host with `give`, or none of them: at a refusal, `take_away` blocks
/// what was given, the last one first. Returns whose decision was refused, and whether something
/// is reachable then.
pub(super) fn give_all<R: Copy + PartialEq, D, I: DoubleEndedIterator<Item = (R, D)>>(
    all: impl Fn() -> I,
    give: impl Fn(R, D) -> Result<(), HostSideError>,
    take_away: impl Fn(R) -> Applied,
) -> Result<(), (R, HostSideError)> {
    for (requester, decision) in all() {
        if let Err(mut source) = give(requester, decision) {
            let given = all().rev().map(|(given, _)| given).skip_while(|given| *given != requester);
            // The refused one is among them, so this is all that is reachable by now.
            let left = given.filter(|given| take_away(*given).is_err());
            source.still_reachable = left.count() > 0;
            return Err((requester, source));
        }
    }
    Ok(())
}

/// The version of a snapshot that is being read: any but `known` ends that before the next field.
#[cfg(feature = "serde")]
pub(super) fn read_version<'de, D: serde::Deserializer<'de>>(
    deserializer: D,
    model: &'static str,
    known: u32,
) -> Result<u32, D::Error> {
    let found = serde::Deserialize::deserialize(deserializer)?;
    check_version(model, found, known).map_err(serde::de::Error::custom)?;
    Ok(found)
}
