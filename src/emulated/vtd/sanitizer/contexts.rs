// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The guest's context and PASID tables, of which the host sees what comes of them only.
#![forbid(unsafe_code)]

use std::fmt;

use crate::emulated::vtd::context::Tables;
use crate::spec::pci::Bdf;

/// Where a requester's DMA goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize))]
pub enum DmaWay {
    /// Nowhere.
    Blocked,
    /// To guest memory as it is.
    Bypass,
    /// Through first-stage tables at this GPA (bytes).
    FirstStage(u64),
    /// Through second-stage tables of the guest's own at this GPA (bytes).
    SecondStage(u64),
}

impl DmaWay {
    /// The way through `tables`.
    pub(super) fn of(tables: &Tables) -> Self {
        match tables {
            Tables::None => Self::Bypass,
            Tables::FirstStage(tables) => Self::FirstStage(tables.table),
            Tables::SecondStage(tables) => Self::SecondStage(tables.table),
            Tables::Unsupported => Self::Blocked,
        }
    }
}

impl fmt::Display for DmaWay {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Blocked => f.write_str("nowhere"),
            Self::Bypass => f.write_str("past all tables"),
            Self::FirstStage(table) => write!(f, "through first-stage tables at {table:#x}"),
            Self::SecondStage(table) => write!(f, "through second-stage tables at {table:#x}"),
        }
    }
}

/// The guest's context and PASID tables.
pub trait ContextTables: fmt::Debug + Send + Sync {
    /// Where they send requests of `rid` (with this `pasid`) now; `None` when there is nothing to
    /// be said, as while translation is off.
    ///
    /// Called in the middle of a DMA: it must wait for nothing that waits for DMA.
    fn way(&self, rid: Bdf, pasid: Option<u32>) -> Option<DmaWay>;
}

/// DMA went a way that the guest's context and PASID tables no longer had: the guest changed them,
/// and had not completed the invalidation of the context or PASID cache that this needs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize))]
pub struct StaleContext {
    /// The requester.
    #[cfg_attr(feature = "serde", serde(serialize_with = "as_text"))]
    pub rid: Bdf,
    /// Its PASID, when requests carried one.
    pub pasid: Option<u32>,
    /// Where the first such request went.
    pub old: DmaWay,
    /// Where the tables would have sent it.
    pub new: DmaWay,
    /// How many such requests there were.
    pub uses: u64,
    /// The way was changed later.
    pub invalidated_since: bool,
}

/// Serializes a requester as `bus:device.function`.
#[cfg(feature = "serde")]
pub(super) fn as_text<S: serde::Serializer>(rid: &Bdf, to: S) -> Result<S::Ok, S::Error> {
    to.collect_str(rid)
}

impl fmt::Display for StaleContext {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.rid)?;
        if let Some(pasid) = self.pasid {
            write!(f, " PASID {pasid:#x}")?;
        }
        write!(
            f,
            ", DMA went {}, and by context and PASID tables goes {} now; needed: invalidation of the \
             PASID cache (in legacy mode, of the context cache), then of the IOTLB",
            self.old, self.new
        )
    }
}
