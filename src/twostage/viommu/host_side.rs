// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Common to the host sides of all virtual IOMMUs: the source of DMA requests, and what a host
//! refuses.

use std::error::Error;
use std::fmt;
use std::sync::Arc;

use crate::spec::pci::{Bdf, Pasid};

/// The source of a DMA request: a PCI function, and a PASID if the request carries one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Requester {
    /// Requester ID as the guest sees it.
    pub rid: Bdf,
    /// PASID of the request; `None` for a request without.
    pub pasid: Option<Pasid>,
}

impl Requester {
    /// Requests of `rid` without PASID.
    pub const fn rid(rid: Bdf) -> Self {
        Self { rid, pasid: None }
    }
}

impl fmt::Display for Requester {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.pasid {
            Some(pasid) => write!(f, "{} PASID {pasid}", self.rid),
            None => write!(f, "{}", self.rid),
        }
    }
}

/// Names a group of page requests, or a stalled transaction, for its host side, which gives no
/// number twice.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct PageTicket(pub u64);

/// The host refused.
#[derive(Debug, Clone, thiserror::Error)]
#[error("{what}: {source}")]
#[non_exhaustive]
pub struct HostSideError {
    /// The attempted operation, and the requester.
    pub what: String,
    /// Blocking failed, too: DMA may still use a mapping that the guest has revoked, so the guest
    /// must not be told that it is gone.
    pub still_reachable: bool,
    /// The verb that failed.
    #[source]
    pub source: Arc<dyn Error + Send + Sync>,
}

impl HostSideError {
    /// `what` was refused because of `source`; [`HostSideError::still_reachable`].
    pub fn new(
        what: impl Into<String>,
        still_reachable: bool,
        source: Arc<dyn Error + Send + Sync>,
    ) -> Self {
        Self { what: what.into(), still_reachable, source }
    }
}

/// A host unit does not support what the configuration asks for.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("the IOMMU of {device} lacks {bit}: {needed_for}")]
#[non_exhaustive]
pub struct CapabilityConflict {
    /// A device behind the unit.
    pub device: String,
    /// The register and field, such as `ECAP.NEST`, or the host's capability.
    pub bit: &'static str,
    /// What the field is needed for, and what to change.
    pub needed_for: String,
}

/// Why a configuration is not reduced to what hosts support.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum IntersectError {
    /// Of no host everything is the common part, and a guest would be offered what none has.
    #[error("no host unit is given, so it is not known what can be offered to the guest")]
    NoHosts,
    /// A host unit lacks what was requested by value.
    #[error(transparent)]
    Lacks(#[from] CapabilityConflict),
}

/// Why a device that comes late needs what others can do without.
pub(super) const OFFERED_BEFORE: &str =
    "the guest was offered it before this device came; give the device to the guest from the \
     start, or leave it out";
