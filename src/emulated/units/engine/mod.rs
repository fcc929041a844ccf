// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What emulated IOMMUs of every architecture have in common: caches, page walks, and how DMA comes
//! to them.
//!
//! An IOMMU of an architecture (its *unit*) is an [`Engine`] behind a gate: readers translate, with
//! shared access; a writer changes the configuration and drops what is cached, with exclusive
//! access. Which configuration serves a request, what its tables look like and what a fault is are
//! the architecture's; a request then meets the same IOTLB, paging-structure cache and cache of
//! stage-2 translations everywhere.

mod cache;
mod caches;
mod config_cache;
mod counters;
mod format;
mod host_stage2;
mod key;
mod memories;
mod origins;
mod ranges;
pub(crate) mod request;
mod sanitizer;
mod sharing;
#[cfg(test)]
pub(crate) mod testing;
mod trail;
mod walk;

use std::fmt::Debug;
use std::ops::RangeInclusive;
use std::sync::Arc;

use crate::dma::error::DmaFaultReason;
use crate::units::gate::Gate;
use crate::units::page_requests::PageRequests;

pub(crate) use caches::{CacheSizes, Caches, Table};
pub(crate) use counters::{Counters, Totals};
pub(crate) use format::{At, Entry, Path, Stage2Refusal, TableFormat};
pub(crate) use host_stage2::HostStage2;
pub(crate) use key::{size, Scope, Source, Spaces};
pub(crate) use origins::Origins;
pub(crate) use ranges::{ascending, IovaRange};
pub(crate) use request::Rights;
pub(crate) use sanitizer::{Sanitizer, Used};
pub(crate) use sharing::{Gone, Sharing};
pub(crate) use trail::Trail;
pub(crate) use walk::Walk;

pub(crate) use caches::Target;
pub(crate) use config_cache::ConfigCache;
pub(crate) use counters::LocalCounters;
pub(crate) use request::{Request, RequestKind};
pub use sanitizer::{
    ContextInvalidation, ContextTables, DmaWay, InvalidatedPages, SanitizerReport, StaleContext,
    StaleUse, TlbInvalidation,
};

/// Why a request reaches no memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Blocked<F> {
    /// It is a fault.
    Fault(F),
    /// It is an interrupt message, to this GPA (bytes).
    Interrupt(u64),
}

impl<F> From<F> for Blocked<F> {
    fn from(fault: F) -> Self {
        Self::Fault(fault)
    }
}

/// The translations of one unit: the way of a request through configuration, tables and caches.
pub(crate) trait Engine: Debug + Send + Sync {
    /// Why a request is blocked.
    type Fault: Copy + Debug;

    /// IOVAs that are interrupt messages whatever the configuration says, in requests without
    /// PASID.
    const INTERRUPTS: Option<RangeInclusive<u64>>;

    /// Where `request` goes, when all that takes is cached.
    fn cached(
        &self,
        config: &ConfigCache,
        counters: &LocalCounters,
        request: &Request,
    ) -> Option<Target>;

    /// Where `request` goes. What it takes is cached from then on.
    fn translate(
        &self,
        config: &mut ConfigCache,
        counters: &LocalCounters,
        request: &Request,
    ) -> Result<Target, Blocked<Self::Fault>>;

    /// Where cached translations lead.
    fn caches(&self) -> &Caches;
}

/// One IOMMU, as DMA sees it.
pub(crate) trait Unit: Debug + Send + Sync {
    /// What translates.
    type Engine: Engine;

    /// The gate that translations are read through.
    fn gate(&self) -> &Arc<Gate<Self::Engine>>;

    /// A share of the counters, for one more thread.
    fn counters_share(&self) -> Arc<LocalCounters>;

    /// Tells who wants to know that `request` was blocked. Not to be called with the gate entered:
    /// who is told may invalidate.
    fn report(&self, request: &Request, fault: <Self::Engine as Engine>::Fault);

    /// Whether `fault` says that nothing is attached for the requester, and its user may find that
    /// something ought to be.
    fn nothing_attached(fault: <Self::Engine as Engine>::Fault) -> bool;

    /// Asks the user of the requester of `request`, for which nothing is attached, whether
    /// something is now. To be called as [`Unit::report`] is.
    fn attached_late(&self, request: &Request) -> bool;

    /// The page requests of its devices: of none, when it takes none.
    fn page_requests(&self) -> &PageRequests;

    /// Whether a device that can asks for the page that a request of `kind` did not get because of
    /// `fault`: software can mend the translation.
    fn asks_for_page(fault: <Self::Engine as Engine>::Fault, kind: RequestKind) -> bool;

    /// What `fault` is to whoever made the request, and whether it was the host's stage 2 that
    /// refused.
    fn reason(fault: <Self::Engine as Engine>::Fault) -> (DmaFaultReason, bool);
}
