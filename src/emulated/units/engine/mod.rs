// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What emulated IOMMUs of all architectures have in common: caches, page walks and the DMA
//! interface.
//!
//! An IOMMU of an architecture (its *unit*) is an [`Engine`] behind a gate: readers translate, with
//! shared access; a writer changes the configuration and drops cached entries, with exclusive
//! access. The architecture determines which configuration serves a request, the format of its
//! tables and its faults; the IOTLB, the paging-structure cache and the cache of stage-2
//! translations are common.

mod cache;
mod caches;
mod counters;
mod format;
mod host_stage2;
mod key;
mod memories;
mod origins;
mod sanitizer;
#[cfg(test)]
pub(crate) mod testing;
mod walk;

use std::fmt::Debug;
use std::ops::RangeInclusive;
use std::sync::Arc;

use crate::dma::error::DmaFaultReason;
use crate::units::gate::Gate;
use crate::units::page_requests::PageRequests;

pub(crate) use caches::{CacheSizes, Caches, Table, Target};
pub(crate) use counters::{Counters, LocalCounters, Totals};
pub(crate) use format::{
    At, Entry, Path, Request, RequestKind, Rights, Stage2Refusal, TableFormat,
};
pub(crate) use host_stage2::{Gone, HostStage2, Sharing};
pub(crate) use key::{ascending, size, IovaRange, Scope, Source, Spaces};
pub(crate) use origins::{Origins, Trail};
pub(crate) use sanitizer::{Sanitizer, Used};
pub(crate) use walk::Walk;

pub use sanitizer::{
    ContextInvalidation, ContextTables, DmaWay, InvalidatedPages, SanitizerReport, StaleContext,
    StaleUse, TlbInvalidation,
};

/// Why a request does not reach memory.
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

/// The translations of one unit: configuration, tables and caches.
pub(crate) trait Engine: Debug + Send + Sync {
    /// Why a request is blocked.
    type Fault: Copy + Debug;

    /// IOVAs that are interrupt messages regardless of the configuration, in requests without
    /// PASID.
    const INTERRUPTS: Option<RangeInclusive<u64>>;

    /// Translates `request` if everything needed is cached.
    fn cached(
        &self,
        config: &ConfigCache,
        counters: &LocalCounters,
        request: &Request,
    ) -> Option<Target>;

    /// Translates `request` and caches what it used.
    fn translate(
        &self,
        config: &mut ConfigCache,
        counters: &LocalCounters,
        request: &Request,
    ) -> Result<Target, Blocked<Self::Fault>>;

    /// The caches.
    fn caches(&self) -> &Caches;
}

/// One IOMMU, as seen by DMA.
pub(crate) trait Unit: Debug + Send + Sync {
    /// The translation engine.
    type Engine: Engine;

    /// The gate in front of the engine.
    fn gate(&self) -> &Arc<Gate<Self::Engine>>;

    /// A share of the counters for one more thread.
    fn counters_share(&self) -> Arc<LocalCounters>;

    /// Reports that `request` was blocked. Not to be called inside the gate, as the sink may
    /// invalidate.
    fn report(&self, request: &Request, fault: <Self::Engine as Engine>::Fault);

    /// Whether `fault` means that nothing is attached for the requester, so that its user may
    /// attach something on demand.
    fn nothing_attached(fault: <Self::Engine as Engine>::Fault) -> bool;

    /// Asks the user of the requester of `request`, for which nothing is attached, to attach
    /// something; returns whether it did. The rules of [`Unit::report`] apply.
    fn attached_late(&self, request: &Request) -> bool;

    /// The page requests of its devices; of none if it takes none.
    fn page_requests(&self) -> &PageRequests;

    /// Whether a device with PRI requests the page that a request of `kind` did not get because of
    /// `fault`, as software can fix the translation.
    fn asks_for_page(fault: <Self::Engine as Engine>::Fault, kind: RequestKind) -> bool;

    /// The reason of `fault` for the requester, and whether the host's stage 2 refused.
    fn reason(fault: <Self::Engine as Engine>::Fault) -> (DmaFaultReason, bool);
}

/// Lines of a [`ConfigCache`], each for the PASIDs of one remainder.
const CONFIG_LINES: usize = 8;

/// Per-thread cache: the indices of one requester's configurations in a table of the engine, by
/// PASID. Invalid as soon as the table has changed, which gives it another *generation*.
#[derive(Debug, Default, Clone)]
pub(crate) struct ConfigCache {
    generation: u64,
    /// The PASID and the index of its configuration.
    lines: [Option<(Option<u32>, usize)>; CONFIG_LINES],
}

impl ConfigCache {
    /// The index of the configuration for requests with `pasid`, if cached in the table's
    /// `generation`.
    #[inline]
    pub fn get(&self, generation: u64, pasid: Option<u32>) -> Option<usize> {
        // In bounds: a remainder of a division by the length.
        let (held, index) = self.lines[config_line(pasid)]?;
        (self.generation == generation && held == pasid).then_some(index)
    }

    /// Caches the `index` for requests with `pasid`; returns whether another one was evicted.
    pub fn fill(&mut self, generation: u64, pasid: Option<u32>, index: usize) -> bool {
        if self.generation != generation {
            *self = Self { generation, ..Self::default() };
        }
        // In bounds: a remainder of a division by the length.
        self.lines[config_line(pasid)].replace((pasid, index)).is_some()
    }
}

/// The line for requests with `pasid`.
#[inline]
fn config_line(pasid: Option<u32>) -> usize {
    pasid.unwrap_or(0) as usize % CONFIG_LINES
}
